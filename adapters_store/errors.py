"""What can go wrong with adapters, graphs and the store.

EspalierError
├── NotFoundError              a name that resolves to nothing
│   ├── AdapterNotFoundError
│   ├── TaskNotFoundError
│   └── GraphNotFoundError
├── InvalidError               a value that cannot be used, whoever sent it
│   ├── InvalidNameError       a name or reference that is not one
│   ├── InvalidGraphError      a graph that no prior can be made of
│   └── InvalidCompositionError
├── RefusedError               an adapter that will not be loaded or published; `code` says why
│   ├── BackboneMismatchError, UnknownSiteError, NoSiteError, ShapeError, RankError, NotFiniteError,
│   │   AllZeroError, LabelsError, FormatError, KeysError, TooLargeError, UnsupportedError, GoldenError
├── CorruptError               bytes on disk that are not what was published
└── ConflictError              somebody else was first

Each class carries a stable `code`; the server maps classes to statuses in one table. Messages say what was expected,
what came, and what to do.
"""


class EspalierError(Exception):
    """Base of everything the three packages raise on purpose."""

    code = "internal"


class NotFoundError(EspalierError):
    """A name that resolves to nothing."""

    code = "not_found"


class AdapterNotFoundError(NotFoundError):
    """No such adapter, version, alias or digest."""

    code = "adapter_not_found"


class TaskNotFoundError(NotFoundError):
    """No adapter answers this task."""

    code = "task_not_found"


class GraphNotFoundError(NotFoundError):
    """No such graph version."""

    code = "graph_not_found"


class InvalidError(EspalierError):
    """A value that cannot be used."""

    code = "invalid"


class InvalidNameError(InvalidError):
    """A name or reference that is not well formed."""

    code = "invalid_name"


class InvalidGraphError(InvalidError):
    """A relation graph that no prior can be made of."""

    code = "invalid_graph"


class InvalidCompositionError(InvalidError):
    """A composition that cannot be served: no weights, a weight that is no number, the wrong number of layers."""

    code = "invalid_composition"


class RefusedError(EspalierError):
    """An adapter that will not be loaded or published."""

    code = "refused"


class BackboneMismatchError(RefusedError):
    """Trained on another backbone than the one it should run on."""

    code = "backbone_mismatch"


class UnknownSiteError(RefusedError):
    """Names a place that the backbone does not have."""

    code = "unknown_site"


class NoSiteError(RefusedError):
    """Touches no place in the backbone and brings no head."""

    code = "no_site"


class ShapeError(RefusedError):
    """A tensor's shape or dtype is not the site's."""

    code = "wrong_shape"


class RankError(RefusedError):
    """A rank over the limit."""

    code = "rank_too_large"


class NotFiniteError(RefusedError):
    """NaN or infinity among the numbers."""

    code = "not_finite"


class AllZeroError(RefusedError):
    """Would change nothing anywhere."""

    code = "all_zero"


class LabelsError(RefusedError):
    """Labels that do not fit the head."""

    code = "labels_mismatch"


class FormatError(RefusedError):
    """Not the file it should be: pickle, archive, broken safetensors, broken JSON."""

    code = "bad_format"


class KeysError(RefusedError):
    """Expected and present tensor names differ."""

    code = "keys_mismatch"


class TooLargeError(RefusedError):
    """A size over the limit."""

    code = "too_large"


class UnsupportedError(RefusedError):
    """Well formed, but a method or option that cannot be served exactly."""

    code = "unsupported"


class GoldenError(RefusedError):
    """Golden examples gave other logits than the manifest promises."""

    code = "golden_mismatch"


class CorruptError(EspalierError):
    """Stored bytes do not have the digest under which they were published."""

    code = "corrupt"


class ConflictError(EspalierError):
    """Somebody else changed it first."""

    code = "conflict"
