"""Several engines, each a replica, behind one front."""
