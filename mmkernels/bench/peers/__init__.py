"""Who else can run the ops on a CPU, one file each: every function takes a Problem and makes a Prepared.

A peer runs at its best: nothing it could reuse is rebuilt inside the timed call, and nothing it must do for a user is
left out of it.  Third-party code is imported inside functions; whoever is missing raises Unavailable and says why.
"""
