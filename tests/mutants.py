"""Sabotages of clip, noise, sampler and accounts, one line each; every one has to make a test fail.

`make mutants` copies the tree to a temporary folder, breaks one line at a time there, runs the tests that guard it, and
lists what survived. A survivor is a promise that no test keeps.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENGINE = "tests/tfprivacy_ft/clipping/test_engine.py"
PLAN = "tests/tfprivacy_ft/test_plan.py"
OPTIMIZERS = "tests/tfprivacy_ft/test_optimizers.py"
RULES = "tests/tfprivacy_ft/clipping/test_rules.py"
UNITS = "tests/tfprivacy_ft/clipping/test_units.py"
ACCUMULATION = "tests/tfprivacy_ft/test_accumulation.py"
MOVING = "tests/tfprivacy_ft/test_moving_clip.py"
NOISE = "tests/tfprivacy_ft/test_noise.py"


class Mutant(NamedTuple):
    """One sabotage: what it means, where, which text becomes which, and the tests (file, -k expression) that guard it."""

    meaning: str
    file: str
    old: str
    new: str
    test: str
    only: str


MUTANTS = (
    Mutant(
        "no clip",
        "clipping/rules.py",
        "tf.minimum(1.0, clip / tf.maximum(tf.sqrt(tf.add_n(added)), _SMALLEST))",
        "tf.ones_like(added[0])",
        ENGINE,
        "one_example_moves",
    ),
    Mutant(
        "bad rows kept",
        "clipping/engine.py",
        "c.keep(finite).weighted_sum",
        "c.weighted_sum",
        ENGINE,
        "bad_example or weight_zero",
    ),
    Mutant(
        "one of several uses counted",
        "clipping/engine.py",
        "Instantiated(tf.add_n([part.per_example() for part in parts]))",
        "parts[0]",
        ENGINE,
        "twice or tied",
    ),
    Mutant(
        "coupling allowed",
        "clipping/engine.py",
        "        _refuse_coupling(loss, variables, layouts)\n",
        "",
        ENGINE,
        "batch_normalization or mean_over",
    ),
    Mutant("mean for sum", "clipping/terms.py", "        return out // batch", "        return out", ENGINE, "dense"),
    Mutant(
        "size written in the trace kept",
        "clipping/terms.py",
        "return tf.constant(int(value) // batch, constant.dtype)",
        "return constant",
        ENGINE,
        "static_batch",
    ),
    Mutant(
        "term with the batch size dropped",
        "clipping/terms.py",
        "told_apart = False  # a regulariser",
        "pass  # a regulariser",
        ENGINE,
        "tells",
    ),
    Mutant(
        "swish differentiated over the batch",
        "clipping/graph.py",
        'copy._clear_attr("_gradient_op_type")',
        "pass",
        ENGINE,
        "unusual",
    ),
    Mutant(
        "custom gradients trusted",
        "clipping/one_by_one.py",
        "        check_isolated(tf.compat.v1.get_default_graph(), data, allowed)\n",
        "",
        ENGINE,
        "custom_gradient",
    ),
    Mutant(
        "learned weight of the loss as regulariser",
        "clipping/terms.py",
        "separate = [t for t in independent if id(t) not in behind and",
        "separate = [t for t in independent if",
        ENGINE,
        "learned",
    ),
    Mutant(
        "padding marks not seen",
        "clipping/one_by_one.py",
        "tf.bitcast(weights, tf.int32) != tf.int32.min",
        "tf.fill(tf.shape(weights), True)",
        ENGINE,
        "filled",
    ),
    Mutant(
        "a shuffle of the batch taken for noise",
        "clipping/one_by_one.py",
        "if any(layouts.of(t) not in sizes for t in op.inputs):",
        "if False:",
        ENGINE,
        "draws",
    ),
    Mutant(
        "noise without the clip",
        "optimizers.py",
        "self.noise.like(total, clip * multiplier)",
        "self.noise.like(total, multiplier)",
        NOISE,
        "standard",
    ),
    Mutant(
        "noise from a known key",
        "noise.py",
        "os.urandom(24)",
        "bytes(range(24))",
        NOISE,
        "global or processes or restored",
    ),
    Mutant(
        "drawn batch as denominator",
        "optimizers.py",
        "tf.where(self.expected_batch_size > 0, self.expected_batch_size, batch.rows)",
        "batch.rows",
        "tests/tfprivacy_ft/test_optimizers.py",
        "expected_batch",
    ),
    Mutant(
        "raw gradients applied",
        "keras_compat.py",
        "raise _raw_gradients()",
        "pass",
        "tests/tfprivacy_ft/test_optimizers.py",
        "raw",
    ),
    Mutant(
        "step beyond the reservation",
        "guard.py",
        "return (self._done < self._reserved)",
        "return (self._done < self._reserved + 1)",
        PLAN,
        "reserved or budget",
    ),
    Mutant(
        "unannounced steps as Poisson",
        "recorder.py",
        "            self._sampling = UNKNOWN\n            self._reserve(1)\n            self._allowed",
        "            self._reserve(1)\n            self._allowed",
        PLAN,
        "broke or two_fits",
    ),
    Mutant("budget starts afresh", "recorder.py", " - alike * length", "", PLAN, "budget"),
    Mutant(
        "sampling probability a tenth off",
        "sampling.py",
        "< batch_size / size",
        "< 1.1 * batch_size / size",
        "tests/tfprivacy_ft/test_sampling.py",
        "each_example",
    ),
    Mutant(
        "any batches as Poisson",
        "plan.py",
        "if any(x is batches for batches in self._drawn):",
        "if self._drawn:",
        PLAN,
        "nobody",
    ),
    Mutant(
        "replace-one without the factor two",
        "accounting.py",
        'return _Release("fixed", noise / 2,',
        'return _Release("fixed", noise,',
        "tests/tfprivacy_ft/test_accounting.py",
        "golden or fixed",
    ),
    Mutant(
        "open reservations not counted",
        "ledger.py",
        "*self._settled, *self.outstanding.values()",
        "*self._settled",
        "tests/tfprivacy_ft/test_ledger.py",
        "",
    ),
    Mutant(
        "each layer gets the whole clip",
        "clipping/rules.py",
        "1 / math.sqrt(len(set(groups)))",
        "1.0",
        RULES,
        "per_layer",
    ),
    Mutant(
        "a step for every micro-batch",
        "accumulation.py",
        "position + 1 >= self._steps",
        "position >= 0",
        ACCUMULATION,
        "",
    ),
    Mutant(
        "logical batches shifted against the draws",
        "accumulation.py",
        "        if int(self._position) != position:\n            self._move_to(position)\n",
        "",
        ACCUMULATION,
        "in_between",
    ),
    Mutant(
        "data of another kind of step kept",
        "accumulation.py",
        "fresh = other | (position == 0)",
        "fresh = position == 0",
        ACCUMULATION,
        "in_between",
    ),
    Mutant(
        "a logical batch over two passes",
        "accumulation.py",
        "        self._passed = 0\n        self._move_to(0)",
        "        pass",
        ACCUMULATION,
        "interrupted or span",
    ),
    Mutant(
        "micro-batches of unknown origin counted once",
        "sampling.py",
        "noise_multiplier /= accumulation_steps",
        "pass",
        ACCUMULATION,
        "nobody",
    ),
    Mutant(
        "part of an example let through",
        "clipping/engine.py",
        "tf.debugging.assert_equal(rows % rows_per_example, 0, message=sentence)",
        "None",
        UNITS,
        "part",
    ),
    Mutant("rows drawn apart", "sampling.py", "chosen * rows_per_example", "chosen", UNITS, "sampler"),
    Mutant(
        "sum not unscaled",
        "clipping/engine.py",
        "w / loss_scale, 0.0",
        "w, 0.0",
        OPTIMIZERS,
        "half_precision or float16",
    ),
    Mutant(
        "norms not unscaled",
        "clipping/engine.py",
        "c.squared_norms() / loss_scale**2",
        "c.squared_norms()",
        OPTIMIZERS,
        "half",
    ),
    Mutant("clip moves the wrong way", "moving_clip.py", "tf.exp(-self", "tf.exp(self", MOVING, "quantile"),
    Mutant("the count is free", "moving_clip.py", "- (2 * count_stddev) ** -2", "", MOVING, "cost"),
    Mutant("padding votes", "moving_clip.py", "tf.where(real, within, 0.0)", "within", MOVING, "vote"),
    Mutant(
        "noise of the first clip",
        "optimizers.py",
        "clip * multiplier)",
        "self._l2_norm_clip * multiplier)",
        MOVING,
        "bound",
    ),
    Mutant(
        "no noise on the count",
        "optimizers.py",
        "batch.votes + self.noise.like(batch.votes, self.moving_clip.count_stddev)",
        "batch.votes",
        MOVING,
        "count_is_noisy",
    ),
)


def survives(mutant: Mutant, tree: pathlib.Path) -> bool:
    """Whether the tests that guard the line still pass when it is broken."""
    file = tree / "tfprivacy_ft" / mutant.file
    source = file.read_text()
    if source.count(mutant.old) < 1:
        raise SystemExit(f"{mutant.meaning}: {mutant.old!r} is no longer in {mutant.file}: bring the list up to date.")
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-q", mutant.test]
        command += ["-k", mutant.only] if mutant.only else []
        code = subprocess.run(command, cwd=tree, capture_output=True, text=True).returncode
    finally:
        file.write_text(source)
    if code not in (0, 1):
        raise SystemExit(f"{mutant.meaning}: pytest ended with {code}: the tests that guard it do not run.")
    return code == 0


def main() -> int:
    """Runs all mutants; 1 if one survived."""
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
        for mutant in MUTANTS:
            alive = survives(mutant, tree)
            survivors += [mutant.meaning] if alive else []
            print(f"{'SURVIVED' if alive else 'killed':8}  {mutant.meaning}", flush=True)
    print(f"{len(MUTANTS) - len(survivors)} killed, {len(survivors)} survived")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
