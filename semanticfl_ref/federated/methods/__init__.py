"""The federated methods, one file each. Their names and settings are in config/methods.py.

| method | adds to the local loss | corrects the gradient | keeps across rounds | weighted by |
| --- | --- | --- | --- | --- |
| fedavg | | | | images |
| fedprox | squared distance to the model received | | | images |
| scaffold | | c - c_i, or the step | control variates [M, P], [P] | images |
| moon | contrast: received against previous model | | previous models [M, P] | images |
| fedrcl | supervised contrast, divergence penalty, per level | | | images |
| feddisco | | | | images and label discrepancy |
| fedcda | | | recent models [M, memory, P] | evenly, of the least divergent models |
| feddifrc | consistency and contrast with diffusion features | | | images |
| semanticfl | consistency and contrast with diffusion anchors | | | images |
"""
