"""Exchange of parameters between ranks: who sends to whom, mailboxes, the courier between nodes, averaging.

Knows nothing of reinforcement learning. Imports `mpi` and the ground; imported by `learning` (parameters alone),
`graphs`, `doctor`, `bench` and `train`. Entry point: `gossip.Gossip`.
"""
