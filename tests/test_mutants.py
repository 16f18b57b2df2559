"""The list of sabotages names lines that are there, and tests that are there."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.meaning)
def test_each_sabotage_has_its_line_and_its_tests(mutant):
    source = mutants.path_of(mutant, mutants.ROOT).read_text()
    assert source.count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert (mutants.ROOT / mutant.test).is_file()
