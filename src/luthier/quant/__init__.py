"""Linear weights stored in few bits and frozen: the base under an adapter."""
