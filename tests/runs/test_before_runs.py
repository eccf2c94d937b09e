"""--dry_run in real processes: says what the run would be and take, and writes nothing."""
import re

import pytest

import harness


@pytest.mark.parametrize("script, flags", [
    ("randommask", ["--block_size", 12]), ("cm_gems", ["--block_size", 12]), ("findna", ["--length", 30])])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, script, flags, ranks):
    """The time is that of all micro-batches of a rank: 4 with one rank, 2 with two."""
    monkeypatch.chdir(tmp_path)
    harness.write_fasta(tmp_path / "g.fa", {"a": "ACGGTCATTGCA" * 300})
    args = ["--demo", "--genome", "g.fa", "--cache", "cache", "--dry_run", "--steps", 7, "--batch_size", 8,
            "--micro_batch_size", 2, "--log_every", 1, "--eval_every", 1, "--device", "cpu", *flags]
    result = harness.run(args, ranks=ranks, script=f"{script}.py")
    assert result.codes == [0] * ranks and not result.err, result
    said = r"dry run  10 steps of a micro-batch: .*/s, .* s a step, .* h for 7 steps .*nothing"
    assert re.search(said, result.out) and "memory   about" in result.out, result
    assert "done" not in result.out and "loss" not in result.out
    assert {path.name for path in tmp_path.iterdir()} == {"g.fa", "cache"}


def test_steps_of_another_genome_are_kept_at_a_resume(tmp_path, monkeypatch):
    """43 passes over what windows reach; the resumed run has as many steps."""
    monkeypatch.chdir(tmp_path)
    harness.write_fasta(tmp_path / "g.fa", {"a": "ACGGTCATTGCA" * 500})
    args = ["--genome", "g.fa", "--out", "out", "--k", 2, "--block_size", 42, "--n_layer", 1, "--n_head", 1,
            "--n_embd", 8, "--batch_size", 2048, "--micro_batch_size", 2048, "--eval_windows", 2, "--device",
            "cpu"]
    result = harness.run(args)
    assert result.code == 0 and "steps    4: the paper's 43 passes over this genome" in result.out, result
    again = harness.run(["--resume", "--out", "out"])
    assert again.code == 0 and "passes over this genome" not in again.out, again
    assert "done     4 steps" in again.out
