"""Time and memory of DenseNets beside their peers, and how far ours is from what the device allows."""
