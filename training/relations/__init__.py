"""How tasks relate: a file per view, then their fusion into R. R[i, j] says how much task j's adapter helps task i."""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

__all__ = ["Matrix"]
