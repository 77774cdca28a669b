"""The gRPC service: a running engine for clients in other processes and on other machines."""
