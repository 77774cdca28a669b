"""``headwise doctor``: what would keep an engine from starting or slow it down here, and what to do about it."""
