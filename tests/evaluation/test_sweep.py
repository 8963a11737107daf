"""The course of a sweep: who takes which cell, what is written down, what is skipped."""

import json
import threading
from dataclasses import replace

import pytest
import torch.distributed

from pikv_core.errors import PiKVError
from pikv_core.evaluation.cells import expand
from pikv_core.evaluation.ledger import Ledger
from pikv_core.evaluation.ranks import Ranks
from pikv_core.evaluation.row import Row, Skipped
from pikv_core.evaluation.sweep import sweep
from pikv_core.recipes import load
from pikv_core.runs import Reporter

ROW = Row("k", "h2o", "h2o", "none", "uniform", 0.5, 10, 20, 15, 1.5, 2.5, "torch", [], recall=0.9)


class Told(Reporter):
    def __init__(self):
        self.lines = []

    def status(self, text):
        self.lines.append(text)


def cells(*methods, budgets=(0.5, 0.25)):
    return expand(load("compress", None, (), {"model": "m", "methods": list(methods), "budgets": list(budgets)}))


def row_of(cell):
    return replace(ROW, key=cell.key, method=cell.label, budget=cell.cache.budget)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_every_cell_is_measured_once_by_whoever_is_free(tmp_path, num_ranks):
    work, store = cells("h2o", "tova", "int8", "snapkv"), torch.distributed.HashStore()
    measured, ended = [], []

    def rank(number):
        mine = Ranks(number, num_ranks, store if num_ranks > 1 else None)

        def measure(cell):
            measured.append(cell.key)
            return row_of(cell)

        list(sweep(work, measure, Ledger(tmp_path, number), mine, Reporter()))
        if number:
            ended.append(number)
        mine.end()
        if number == 0:
            assert len(ended) == num_ranks - 1  # rank 0 waits for all the others

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(measured) == sorted(cell.key for cell in work)
    ledger = Ledger(tmp_path)
    assert ledger.read() == {cell.key: row_of(cell) for cell in work}
    ledger.rewrite(row_of(cell) for cell in work)
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
    assert list(ledger.read()) == [cell.key for cell in work]


def test_a_rank_hears_what_another_tells():
    store, heard = torch.distributed.HashStore(), []
    listener = threading.Thread(target=lambda: heard.append(Ranks(1, 2, store).hear("plan")))
    listener.start()
    Ranks(0, 2, store).tell("plan", "all of it")
    listener.join()
    assert heard == ["all of it"]


def test_a_line_that_was_cut_off_counts_for_nothing_and_a_wrong_one_is_told(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(ROW)
    ledger.append(Skipped("s", "fastv", 0.5, "over the budget", "raise it"))
    whole = (tmp_path / "results.jsonl").read_text()
    for cut in range(1, 30, 7):
        (tmp_path / "results.jsonl").write_text(whole + whole[:cut])
        assert list(ledger.read()) == ["k", "s"]
    entries = ledger.read()
    assert entries["k"] == ROW and entries["s"].reason == "over the budget"
    for wrong in ('{"key": 1', "{}", "[]", json.dumps({"reason": "x"})):
        (tmp_path / "results.jsonl").write_text(whole + wrong + "\n" + whole)
        with pytest.raises(PiKVError, match=r"results.jsonl:3: not a row of this sweep"):
            ledger.read()


def test_what_a_method_refuses_is_skipped_with_its_reason_and_the_full_cache_may_not_be(tmp_path):
    told = Told()

    def measure(cell):
        if cell.cache.policy.name == "h2o" and cell.cache.budget == 0.25:
            raise PiKVError("too little", hint="raise it")
        return row_of(cell)

    work = cells("h2o", "tova")
    entries = list(sweep(work, measure, Ledger(tmp_path), Ranks(), told))
    assert entries[2] == Skipped(work[2].key, "h2o", 0.25, "too little", "raise it")
    assert [isinstance(entry, Row) for entry in entries] == [True, True, False, True, True]
    assert "h2o at 0.25: skipped: too little" in told.lines[2] and "(3 of 5" in told.lines[2]
    assert "left" in told.lines[0] and "left" not in told.lines[-1]
    assert Ledger(tmp_path).read() == {entry.key: entry for entry in entries}

    def refuse_all(cell):
        raise PiKVError("no such thing")

    with pytest.raises(PiKVError, match="no such thing"):
        list(sweep(work, refuse_all, Ledger(tmp_path), Ranks(), told))
