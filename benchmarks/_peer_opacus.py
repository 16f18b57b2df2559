"""Steps of Opacus beside plain torch: a worker of `peers.py`, which starts it in an environment that has both.

Every contender is what Opacus's guide has users write: `make_private`, then zero_grad, forward, backward and step. The
noise is torch's own, as by default (no secure mode).
"""

import warnings

import torch
from _peer import batch, report, settings, timed
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MODES = ("hooks", "functorch", "ghost")


def build(model):
    """The MLP or the CNN of `tfprivacy_ft.models.build_model`; the loss takes its logits."""
    if model == "mlp":
        return nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    convolutions = (
        *(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10))


def contender(chosen, x, y, mode=None):
    """Steps of plain torch, or of Opacus in a mode."""
    model, criterion = build(chosen.model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), chosen.learning_rate)
    if mode:
        private = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(x, y), batch_size=chosen.batch_size),
            noise_multiplier=chosen.noise_multiplier,
            max_grad_norm=chosen.l2_norm_clip,
            grad_sample_mode=mode,
            poisson_sampling=False,
        )
        model, optimizer, criterion = private[:3] if mode == "ghost" else (*private[:2], criterion)

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return timed(step)


def main():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    chosen = settings()
    x, y = (torch.from_numpy(part) for part in batch(chosen))
    y = y.long()
    if chosen.model == "cnn":
        x = x.permute(0, 3, 1, 2).contiguous()
    contenders = {"plain torch": contender(chosen, x, y)}
    for mode in MODES:
        contenders[f"Opacus, {mode}"] = contender(chosen, x, y, mode)
    report(contenders, chosen)


if __name__ == "__main__":
    main()
