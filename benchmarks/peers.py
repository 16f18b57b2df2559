"""Milliseconds of one private training step: this package beside its peers, on the same two models and the same batch.

The peers are TensorFlow Privacy, which is measured in this environment, and Opacus and JAX-Privacy, each in one of its own,
which this script makes under `benchmarks/.peers/` with pip and a Python 3.12. What cannot be made, or does not run, is named
and left out. Every private step stands beside the plain step of its own framework, as frameworks differ without privacy too.
All have two CPUs. Frameworks run one after another, so compare them only where nothing else runs on the machine.
"""

import argparse
import glob
import importlib.util
import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # TensorFlow's default on some processors only; torch always has it

import tensorflow as tf
from _models import WORKS
from _peer import Settings
from step_time import CLIP, LEARNING_RATE, NOISE, OURS, contend

FOLDER = Path(__file__).parent
PINS = {
    "opacus": ("torch==2.13.0", "opacus==1.6.0"),
    "jax-privacy": ("jax==0.12.0.1", "keras==3.15.1", "jax-privacy==2.0.0"),
}
PEERS = ("tensorflow-privacy", *PINS)
CPUS = 2


class LeftOut(Exception):
    """Why a peer cannot be measured."""


def use_two_cpus():
    """Binds this process, and those it starts, to two CPUs where the system can; returns how many they have."""
    tf.config.set_visible_devices([], "GPU")
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    return len(os.sched_getaffinity(0))


def output_of(*command):
    """What a command prints, or LeftOut with its last words."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ran.returncode:
        words = ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"]
        errors = [line for line in words if line.startswith("ERROR:")]
        raise LeftOut((errors or words)[-1].removeprefix("ERROR: "))
    return ran.stdout


def python_312():
    """A Python 3.12; under pyenv its command answers only when a version of it is chosen."""
    for python in ("python3.12", *glob.glob(os.path.expanduser("~/.pyenv/versions/3.12.*/bin/python"))):
        if shutil.which(python) and subprocess.run([python, "-V"], capture_output=True).returncode == 0:
            return python
    raise LeftOut("its environment needs a Python 3.12, and there is none")


def environment(peer):
    """The Python of a peer's environment, made first where it is not there. Its stamp is written last."""
    folder, pins = FOLDER / ".peers" / peer, " ".join(PINS[peer])
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not (python.exists() and stamp.exists() and stamp.read_text() == pins):
        base = python_312()
        print(f"Making an environment with {pins}; this takes minutes and some GB of disk.", flush=True)
        output_of(base, "-m", "venv", "--clear", folder)
        output_of(python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", *PINS[peer])
        stamp.write_text(pins)
    return python


def environments(peers):
    """Peer -> Python, for those that have an environment of their own and can be had."""
    found = {}
    for peer in peers:
        try:
            found[peer] = environment(peer)
        except LeftOut as why:
            print(f"{peer} is left out: {why}.", flush=True)
    return found


def measured_here(model, arguments):
    """Name -> (milliseconds, steps timed), plain Keras first."""
    wanted = "tensorflow-privacy" in arguments.peers
    found = contend(WORKS[model], arguments.batch_size, arguments.rounds, arguments.steps, wanted)
    rows = {name: (contender.milliseconds, len(contender.seconds)) for name, contender in found.items()}
    tf.keras.backend.clear_session()
    return rows


def measured_there(peer, python, model, arguments):
    """The same from a peer's worker, the plain step of its framework first."""
    worker = FOLDER / f"_peer_{peer.replace('-', '_')}.py"
    chosen = Settings(model, arguments.batch_size, arguments.rounds, arguments.steps, CLIP, NOISE, LEARNING_RATE)
    return json.loads(output_of(python, "-E", worker, json.dumps(chosen._asdict())).splitlines()[-1])


def table(rows, ours):
    """Rows of one framework, the first of which is its plain step."""
    plain = next(iter(rows.values()))[0]
    for name, (ms, steps) in rows.items():
        print(f"  {name:26} {ms:12.1f} {ms / plain:16.2f} {ms / ours:19.2f} {steps:12}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="default: all; no name: none")
    parser.add_argument("--models", nargs="+", choices=("mlp", "cnn"), default=("mlp", "cnn"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12, help="turns that the contenders of a framework take")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin, and stall where others work too
    cpus = use_two_cpus()
    arguments.peers = set(arguments.peers)
    if "tensorflow-privacy" in arguments.peers and not importlib.util.find_spec("tensorflow_privacy"):
        print("tensorflow-privacy is left out: it is not installed here.")
        arguments.peers.remove("tensorflow-privacy")
    pythons = environments([peer for peer in PINS if peer in arguments.peers])

    for model in arguments.models:
        print(f"{WORKS[model].title}, batch {arguments.batch_size}, {cpus} CPUs")
        print(f"  {'':26} {'ms per step':>12} {'times own plain':>16} {'times tfprivacy_ft':>19} {'steps timed':>12}")
        rows = measured_here(model, arguments)
        ours = rows[OURS][0]
        table(rows, ours)
        for peer, python in pythons.items():
            try:
                table(measured_there(peer, python, model, arguments), ours)
            except LeftOut as why:
                print(f"  {peer} is left out: {why}.")
        print(flush=True)


if __name__ == "__main__":
    main()
