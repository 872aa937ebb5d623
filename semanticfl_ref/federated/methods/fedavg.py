"""FedAvg: cross-entropy on each client, then the average of the models weighted by images.

    w_{t+1} = sum_k n_k / n  w_{t+1}^k

Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep
Networks from Decentralized Data. AISTATS 2017, Algorithm 1. n counts the images of the round's
clients, as in its erratum.

Under label skew and with many local steps, clients drift apart and their average is worse than each
of them: this is what the other methods address.
"""

from semanticfl_ref.federated.methods.method import Method

FEDAVG = Method()
