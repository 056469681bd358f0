"""Handwritten digits on several ranks, each with its own share of the images: gossip beside all-reduce.

    mpirun -n 4 python -m mpi4py examples/digits.py --exchange gossip
    mpirun -n 4 python -m mpi4py examples/digits.py --exchange gossip allreduce none

All three exchanges make the same number of updates on batches of the same size; of several, each trains a model of its
own, one after the other. Rank 0 prints the accuracy of every rank on the same test images, and the mean. `-m mpi4py`
ends the whole job if one rank fails. The 1,797 images of 8 x 8 pixels come with scikit-learn:
pip install -c constraints.txt -e '.[examples]'.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import nn

import gala_mpi

TEST_IMAGES = 597
BATCH = 32


def load(seed: int, comm: MPI.Intracomm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's training images (n, 64) and labels (n,), and the test images and labels that all share."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images = torch.from_numpy(images[order] / 16).float()
    labels = torch.from_numpy(labels[order]).long()
    mine = slice(TEST_IMAGES + comm.rank, None, comm.size)
    return images[mine], labels[mine], images[:TEST_IMAGES], labels[:TEST_IMAGES]


def average_gradients(model: nn.Module, comm: MPI.Intracomm) -> None:
    """Replace every gradient by its mean over all ranks: what gossip makes unnecessary. Collective."""
    mean = nn.utils.parameters_to_vector([parameter.grad for parameter in model.parameters()])
    comm.Allreduce(MPI.IN_PLACE, mean.numpy())
    start = 0
    for parameter in model.parameters():
        parameter.grad.copy_(mean[start : start + parameter.numel()].view_as(parameter) / comm.size)
        start += parameter.numel()


def train(exchange: str, args: argparse.Namespace, comm: MPI.Intracomm) -> float:
    """Train on this rank's images; the accuracy of its model on the test images."""
    torch.manual_seed(args.seed * comm.size + comm.rank)
    images, labels, test_images, test_labels = load(args.seed, comm)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    # The rate falls to zero: what single batches add to a model, and so the differences between ranks, die away.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=args.updates)

    def update() -> None:
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        if exchange == "allreduce":
            average_gradients(model, comm)
        optimizer.step()
        schedule.step()

    if exchange == "gossip":
        with gala_mpi.Gossip(model, comm, topology=args.topology, max_staleness=args.max_staleness) as gossip:
            for _ in range(args.updates):
                update()
                if gossip.step():  # this rank had diverged, and goes on with the parameters of a neighbour
                    optimizer.state.clear()
    else:
        if exchange == "allreduce":
            for parameter in model.parameters():
                comm.Bcast(parameter.detach().numpy())
        for _ in range(args.updates):
            update()
    with torch.no_grad():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    """Read the arguments, train, and print what all ranks have reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchange", nargs="+", choices=("gossip", "allreduce", "none"), default=["gossip"])
    parser.add_argument("--updates", type=int, default=600, help="of each rank (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--topology", default="auto")
    parser.add_argument("--max-staleness", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    for exchange in args.exchange:
        begin = MPI.Wtime()
        accuracy = train(exchange, args, comm)
        found = comm.gather(accuracy)
        if found is not None:
            each = " ".join(f"{value:.4f}" for value in found)
            seconds = MPI.Wtime() - begin
            print(f"{exchange}: test accuracy by rank {each}, mean {np.mean(found):.4f} ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
