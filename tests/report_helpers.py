"""What tests of the report share: runs whose ledgers hold releases, figures and gradient norms."""

from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import GradientNorms, Ledger, Trained

NORMS = GradientNorms(edges=(0.0, 0.5, 1.0, 4.0), counts=(5, 3, 2), clipped=2)
ONE = Event.unknown(
    count=4, noise_multiplier=4.0, l2_norm_clip=1.0
)  # no sampling: its epsilon is a closed form, and fast
CLIENTS = Event.unknown(count=2, noise_multiplier=5.0, unit="client")


def a_run(folder, events=(ONE,) * 3, figure="val_accuracy", delta=1e-5, norms=None, facts=None):
    """A run that settles these events, and after each looks at its model."""
    with Ledger.open(folder, delta=delta, facts={"target_epsilon": 9.0} if facts is None else facts) as book:
        book.trained(Trained(("dense/kernel", "dense/bias"), 30))
        for i, event in enumerate(events):
            book.settle([book.reserve(event)], event)
            if figure:
                book.figures({"val_loss": 1.5, figure: 0.5 + i / 10})
            if norms:
                book.gradient_norms(norms)
    return folder
