"""The command ``python -m densenet_fast bench``, which measures DenseNets on a user's machine.

It measures time and memory of ours beside its peers (``times.py``, ``memory.py``), how far ours is from what the device
allows (``floor.py``), and where its time goes (``profile.py``). ``benchmarks/`` in a checkout is about this repository:
the scripts behind its documents' figures, the model of a GPU's step, the results.
"""
