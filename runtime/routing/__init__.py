"""Which replica, one of several engines of the same model, is to compute a request."""
