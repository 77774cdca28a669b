"""``headwise chaos``: faults while requests run, and whether anybody noticed more than a pause.

The plan is that of etcd's robustness tests: a workload, faults beside it, a history of what each client saw, and a
checker that knows what it had to be. workload.py, faults.py, history.py and checker.py are these; run.py does it all.
"""
