"""Multi-adapter inference over HTTP."""
