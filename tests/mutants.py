"""Sabotages of clip, noise, sampler and accounts, one line each; every one has to make a test fail.

`make mutants` copies the tree to a temporary folder, breaks one line at a time there, runs the tests that guard it, and
lists what survived. A survivor is a promise that no test keeps. `python tests/mutants.py share dilation` runs those only
whose meaning has one of these words.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENGINE = "tests/tfprivacy_ft/clipping/test_engine.py"
EMBEDDING = "tests/tfprivacy_ft/clipping/test_embedding.py"
PRODUCTS = "tests/tfprivacy_ft/clipping/test_products.py"
WEIGHTS = "tests/tfprivacy_ft/clipping/test_weights.py"
CONVOLUTION = "tests/tfprivacy_ft/clipping/test_convolution.py"
LAYOUT = "tests/tfprivacy_ft/clipping/test_layout.py"
PLAN = "tests/tfprivacy_ft/test_plan.py"
OPTIMIZERS = "tests/tfprivacy_ft/test_optimizers.py"
RULES = "tests/tfprivacy_ft/clipping/test_rules.py"
UNITS = "tests/tfprivacy_ft/clipping/test_units.py"
ACCUMULATION = "tests/tfprivacy_ft/test_accumulation.py"
MOVING = "tests/tfprivacy_ft/test_moving_clip.py"
NOISE = "tests/tfprivacy_ft/test_noise.py"
FUNCTIONAL = "tests/tfprivacy_ft/clipping/test_functional.py"
ACCOUNTING = "tests/tfprivacy_ft/test_accounting.py"
PRIVACY = "tests/federated/test_privacy.py"
AVERAGING = "tests/federated/test_averaging.py"


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
        "tf.minimum(clip / tf.maximum(tf.sqrt(tf.add_n(added)), _SMALLEST), 1.0)",
        "tf.ones_like(added[0])",
        ENGINE,
        "one_example_moves",
    ),
    Mutant(
        "bad rows kept",
        "clipping/engine.py",
        "lambda: [[keep_rows(part, finite) for part in of_variable] for of_variable in parts],",
        "lambda: parts,",
        ENGINE,
        "bad_example or weight_zero",
    ),
    Mutant(
        "one of several uses counted",
        "clipping/engine.py",
        "functools.reduce(lambda one, other: one.added_to(other), parts)",
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
        "squares of a tied variable's uses added, not their gradients",
        "clipping/sites.py",
        "Instantiated(self.per_example() + other.per_example())",
        "Instantiated(tf.sqrt(tf.square(self.per_example()) + tf.square(other.per_example())))",
        ENGINE,
        "twice",
    ),
    Mutant(
        "second use of a kernel with the data of the first",
        "clipping/products.py",
        "tf.concat([mine.inputs, theirs.inputs], 1)",
        "tf.concat([mine.inputs, mine.inputs], 1)",
        PRODUCTS,
        "used_twice",
    ),
    Mutant(
        "squares too small to be seen left out",
        "clipping/products.py",
        "tf.sqrt(squared) + unseen",
        "tf.sqrt(squared)",
        PRODUCTS,
        "magnitude",
    ),
    Mutant(
        "a tied table without what its uses have in common",
        "clipping/embedding.py",
        " + 2 * self._in_common()",
        "",
        EMBEDDING,
        "tied",
    ),
    Mutant(
        "tied matrix added without its transposition",
        "clipping/products.py",
        "return matrices(self.outputs, self.inputs, self._steps)",
        "return matrices(self.inputs, self.outputs, self._steps)",
        PRODUCTS,
        "tied",
    ),
    Mutant(
        "time before the batch in a product",
        "clipping/products.py",
        "        axes.index(labels.batch),\n        *(axes.index(c) for c in labels.time),\n",
        "        *(axes.index(c) for c in labels.time),\n        axes.index(labels.batch),\n",
        PRODUCTS,
        "einsum_dense",
    ),
    Mutant(
        "norms by pairs of the inputs alone",
        "clipping/products.py",
        "dots(pairs_in, pairs_out)",
        "dots(pairs_in, tf.ones_like(pairs_out))",
        PRODUCTS,
        "norms_by_pairs or wide",
    ),
    Mutant(
        "norms by pairs not rounded upward",
        "clipping/products.py",
        " + ROUNDING[alone.dtype] * alone",
        "",
        PRODUCTS,
        "norms_by_pairs",
    ),
    Mutant(
        "an Einsum over the batch not seen",
        "clipping/layout.py",
        "return Rows(output.index(label), fold) if label in output else COUPLED",
        "return Rows(output.index(label), fold) if label in output else FREE",
        PRODUCTS,
        "over_the_batch",
    ),
    Mutant(
        "a mean over the batch not seen",
        "clipping/layout.py",
        "if rows.axis in axes:\n            return COUPLED",
        "if rows.axis in axes:\n            return FREE",
        ENGINE,
        "mean_over",
    ),
    Mutant(
        "rows of two examples taken for one's",
        "clipping/layout.py",
        "if math.prod(before[: rows.axis]) != 1:",
        "if False:",
        LAYOUT,
        "",
    ),
    Mutant(
        "blocks of a convolution as if example by example",
        "clipping/convolution.py",
        "tf.stack([blocks, batch_size, -1])",
        "tf.stack([batch_size, blocks, -1])",
        CONVOLUTION,
        "line",
    ),
    Mutant(
        "low-rank pair transposed",
        "clipping/weights.py",
        "matrix = tf.transpose(other) if flip_other else other",
        "matrix = other if flip_other else tf.transpose(other)",
        WEIGHTS,
        "low_rank",
    ),
    Mutant(
        "scale of a low-rank pair forgotten",
        "clipping/weights.py",
        "steps.append(functools.partial(_scaled, factor=others[0]))",
        "pass",
        WEIGHTS,
        "low_rank",
    ),
    Mutant(
        "an op that reads a variable twice counted once",
        "clipping/weights.py",
        "if sum(t is weight for t in op.inputs) > 1 or (",
        "if (",
        WEIGHTS,
        "one_op_reads",
    ),
    Mutant(
        "share of a masked loss by the batch's mask",
        "clipping/terms.py",
        "if not terms.weighed_by_data:",
        "if True:",
        ENGINE,
        "masked_sequence",
    ),
    Mutant(
        "elementwise weights not summed where they are repeated",
        "clipping/broadcast.py",
        "[i + 1 for i, axis in enumerate(order) if i and weight[axis] == 1]",
        "[]",
        ENGINE,
        "dense_over_time",
    ),
    Mutant(
        "SAME padding one pixel off",
        "clipping/patches.py",
        "before = _positive(missing) // 2",
        "before = _positive(missing + 1) // 2",
        CONVOLUTION,
        "windows",
    ),
    Mutant(
        "dilation of patches ignored",
        "clipping/patches.py",
        "np.arange(a.kernel) * a.dilation",
        "np.arange(a.kernel)",
        CONVOLUTION,
        "windows",
    ),
    Mutant(
        "stride of a convolution ignored",
        "clipping/calls.py",
        "strides=tuple(strides[1:-1]),",
        "strides=(1,) * axes,",
        CONVOLUTION,
        "line",
    ),
    Mutant(
        "repeated tokens measured apart",
        "clipping/embedding.py",
        "tf.cast(indices[:, 1:] != indices[:, :-1], tf.int32)",
        "tf.ones_like(indices[:, 1:])",
        EMBEDDING,
        "several_times",
    ),
    Mutant(
        "no clip one by one",
        "clipping/one_by_one.py",
        "tf.cast(w, g.dtype) * g",
        "g",
        ENGINE,
        "lstm",
    ),
    Mutant(
        "noise without the clip",
        "optimizers.py",
        "self.noise.draw(sums, clip, multiplier)",
        "self.noise.draw(sums, 1.0, multiplier)",
        NOISE,
        "standard",
    ),
    Mutant(
        "two variables with the same noise",
        "noise.py",
        "tf.split(flat, _sizes(values))",
        "[flat[:size] for size in _sizes(values)]",
        NOISE,
        "independent",
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
        "a cipher with a known key",
        "noise.py",
        "os.urandom(32)",
        "bytes(32)",
        NOISE,
        "global or processes or restored",
    ),
    Mutant(
        "rounding to the grid for free",
        "noise.py",
        "1.002 * math.sqrt(count)",
        "0.0",
        NOISE,
        "calls_for",
    ),
    Mutant(
        "no grid",
        "noise.py",
        "steps = tf.round(tf.cast(total, tf.float64) * steps_per_unit)",
        "return total + tf.cast(tf.cast(noise, tf.float64) / steps_per_unit, total.dtype)",
        NOISE,
        "grid",
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
        "zip(pairs, made, strict=True)):\n            raise _raw_gradients()",
        "zip(pairs, made, strict=True)):\n            pass",
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
    Mutant("budget starts afresh", "accounting.py", " - alike * _pass_length(one)", "", PLAN, "budget"),
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
        "releases.py",
        'return Release("fixed", noise / 2,',
        'return Release("fixed", noise,',
        ACCOUNTING,
        "golden or fixed",
    ),
    Mutant(
        "a user counted as one example",
        "releases.py",
        "return self.noise_multiplier / self.group",
        "return self.noise_multiplier",
        ACCOUNTING,
        "a_user",
    ),
    Mutant(
        "a search of many runs as cheap as of one",
        "search.py",
        "+ max(math.log(self.mean), 0.0) / (orders - 1)",
        "",
        "tests/tfprivacy_ft/test_search.py",
        "bound",
    ),
    Mutant(
        "batches that repeat examples allowed",
        "sampling.py",
        'if is_batched and "Repeat" in kind:',
        'if not is_batched and "Repeat" in kind:',
        "tests/tfprivacy_ft/test_sampling.py",
        "repeated_before",
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
    Mutant(
        "memory used again while somebody holds it",
        "arrays.py",
        "weakref.finalize(whole, self._free.append, block).atexit = False",
        "self._free.append(block)",
        "tests/tfprivacy_ft/test_arrays.py",
        "memory",
    ),
    Mutant("rows drawn apart", "sampling.py", "chosen * held", "chosen", UNITS, "sampler"),
    Mutant(
        "refused steps averaged",
        "weight_averaging.py",
        "tf.maximum(tf.cast(iterations, tf.int64) - self._seen, 0)",
        "tf.ones([], tf.int64)",
        "tests/tfprivacy_ft/test_weight_averaging.py",
        "private_steps",
    ),
    Mutant(
        "card not escaped",
        "finetune/card.py",
        "finalize=_escaped,",
        "finalize=None,",
        "tests/tfprivacy_ft/finetune/test_card.py",
        "outside",
    ),
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
        "tf.cast(c.squared_norms(), dtype) / loss_scale**2",
        "tf.cast(c.squared_norms(), dtype)",
        OPTIMIZERS,
        "half",
    ),
    Mutant("clip moves the wrong way", "moving_clip.py", "tf.exp(-rule", "tf.exp(rule", MOVING, "quantile"),
    Mutant("the count is free", "moving_clip.py", "- (2 * count_stddev) ** -2", "", MOVING, "cost"),
    Mutant("padding votes", "moving_clip.py", "tf.where(real, within, 0.0)", "within", MOVING, "vote"),
    Mutant(
        "noise of the first clip",
        "optimizers.py",
        "draw(sums, clip, multiplier)",
        "draw(sums, self._l2_norm_clip, multiplier)",
        MOVING,
        "bound",
    ),
    Mutant(
        "no noise on the count",
        "optimizers.py",
        "self.noise.draw([votes], 0.5, stddev / 0.5)([votes])[0] if stddev else votes",
        "votes",
        MOVING,
        "count_is_noisy",
    ),
    Mutant(
        "a tree with a level too few",
        "events.py",
        "return self.leaves_per_tree.bit_length()",
        "return max(1, self.leaves_per_tree.bit_length() - 1)",
        ACCOUNTING,
        "tree",
    ),
    Mutant(
        "pure epsilons amplified as small ones are",
        "pure.py",
        "math.log1p(probability * math.expm1(epsilon))",
        "math.log1p(probability * epsilon)",
        ACCOUNTING,
        "pure",
    ),
    Mutant(
        "a user's pure epsilon that of one example",
        "releases.py",
        "return self.group * pure.amplified_epsilon(of_one",
        "return pure.amplified_epsilon(of_one",
        ACCOUNTING,
        "pure",
    ),
    Mutant(
        "Gaussian noise reserved, Laplace noise settled",
        "ledger.py",
        "if any((one.mechanism, one.leaves_per_tree) != (event.mechanism, event.leaves_per_tree) for one in reserved):",
        "if False:",
        "tests/tfprivacy_ft/test_ledger.py",
        "not_reserved",
    ),
    Mutant(
        "held-out figures that are no release",
        "ledger.py",
        "self.note(EVALUATION.kind, EVALUATION.text)",
        "pass",
        "tests/tfprivacy_ft/test_ledger.py",
        "figures",
    ),
    Mutant(
        "gradient norms that are no release",
        "plan.py",
        "self._ledger.note(GRADIENT_NORMS.kind, GRADIENT_NORMS.text)",
        "pass",
        "tests/tfprivacy_ft/test_gradient_norms.py",
        "asked",
    ),
    Mutant(
        "an allowance that stays open",
        "recorder.py",
        "if done != self._allowed:",
        "if False:",
        PLAN,
        "taken_back",
    ),
    Mutant(
        "a user in cohorts of a fixed size counted as one example",
        "releases.py",
        'return Release("everyone", noise / 2, times, group=group, mechanism=law)\n    if event.is_local',
        'return Release("everyone", noise / 2, times, mechanism=law)\n    if event.is_local',
        ACCOUNTING,
        "fixed_size_counts",
    ),
    Mutant(
        "blocks of the cipher used again",
        "noise.py",
        "delta=tf.cast(needed, tf.uint64)",
        "delta=tf.cast(0, tf.uint64)",
        NOISE,
        "threads",
    ),
    Mutant(
        "rows that fill the batch of a function count",
        "clipping/functional.py",
        "real=every if real is None else real,",
        "real=every,",
        FUNCTIONAL,
        "only_fill",
    ),
    Mutant(
        "labels of minus zero are taken for padding",
        "clipping/functional.py",
        "real=every if real is None else real,",
        "real=real,",
        FUNCTIONAL,
        "minus_zero",
    ),
    Mutant(
        "weights that are arguments are taken for a mask",
        "clipping/graph.py",
        " or any(op is t.op for t in arguments)",
        "",
        FUNCTIONAL,
        "mask",
    ),
    Mutant(
        "an audit that forgets delta",
        "audit/bounds.py",
        "share = 2 * num_canaries * delta / i",
        "share = 0.0 / i",
        "tests/tfprivacy_ft/audit/test_bounds.py",
        "",
    ),
    Mutant(
        "canaries that are never in the data",
        "audit/one_run.py",
        "hidden[included] = 0.0",
        "hidden[included] = PADDING",
        "tests/tfprivacy_ft/audit/test_one_run.py",
        "fifth or bound or epsilon",
    ),
    Mutant(
        "local reports one clip apart",
        "releases.py",
        'return Release("everyone", noise / 2, times, group=group, mechanism=law)  # any two',
        'return Release("everyone", noise, times, group=group, mechanism=law)  # any two',
        ACCOUNTING,
        "two_clips_apart",
    ),
    Mutant(
        "one client's noise for all",
        "federated/aggregation.py",
        "noise = tf.where(present[:, tf.newaxis],",
        "noise = tf.where(present[:, tf.newaxis] & (tf.range(count) == 0)[:, tf.newaxis],",
        PRIVACY,
        "each_client_adds",
    ),
    Mutant(
        "absent clients add noise",
        "federated/aggregation.py",
        "present[:, tf.newaxis]",
        "tf.ones_like(present)[:, tf.newaxis]",
        PRIVACY,
        "each_client_adds",
    ),
    Mutant(
        "clients clipped in the other norm",
        "federated/rounds.py",
        'return 1 if self.mechanism == "laplace" else 2',
        "return 2",
        PRIVACY,
        "laplace_noise",
    ),
    Mutant(
        "votes of clients are free",
        "federated/rounds.py",
        "[clip * on_sum] * len(totals)",
        "[clip * self.privacy.noise_multiplier] * len(totals)",
        PRIVACY,
        "votes_are_paid",
    ),
    Mutant(
        "noise of another round again",
        "federated/process.py",
        "noise_key=aggregation.fresh_noise_key()",
        "noise_key=np.arange(1, 4, dtype=np.uint64)",
        AVERAGING,
        "two_rounds_from_one_state",
    ),
    Mutant(
        "keys stay in states",
        "federated/rounds.py",
        "noise_key=tf.constant(aggregation.blank_noise_key()),\n            optimizer=optimizer,",
        "optimizer=optimizer,",
        AVERAGING,
        "states_hold_no_noise_key",
    ),
    Mutant(
        "promised noise that nobody adds",
        "federated/process.py",
        "if facts.least_reports > _guaranteed(cohorts):",
        "if False:",
        PRIVACY,
        "events_tell",
    ),
    Mutant(
        "weights under privacy",
        "federated/process.py",
        'if self.client_weighting == "examples" and (self.is_noisy or self.target_quantile is not None):',
        "if False:",
        PRIVACY,
        "refused_in_a_sentence",
    ),
)


def path_of(mutant: Mutant, tree: pathlib.Path) -> pathlib.Path:
    """The file to break; in `tfprivacy_ft` unless it says another package."""
    return tree / (mutant.file if mutant.file.startswith("federated/") else f"tfprivacy_ft/{mutant.file}")


def survives(mutant: Mutant, tree: pathlib.Path) -> bool:
    """Whether the tests that guard the line still pass when it is broken."""
    file = path_of(mutant, tree)
    source = file.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.meaning}: {mutant.old!r} is not once in {mutant.file}: bring the list up to date.")
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


def main(words: list[str]) -> int:
    """Runs all mutants, or those whose meaning holds one of `words`; 1 if one survived."""
    survivors = []
    chosen = [m for m in MUTANTS if not words or any(word in m.meaning for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
        for mutant in chosen:
            alive = survives(mutant, tree)
            survivors += [mutant.meaning] if alive else []
            print(f"{'SURVIVED' if alive else 'killed':8}  {mutant.meaning}", flush=True)
    print(f"{len(chosen) - len(survivors)} killed, {len(survivors)} survived")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
