"""`moescope eval` on a real engine and server, against transformers; killed and run again."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from eval_cases import WORDS, choice, make_ranking, question, text, user, write_items
from servers import Server

from moescope.analysis.evaluation import read_evaluation
from moescope.clients.eval_engine import EngineRunner
from moescope.clients.eval_items import read_items
from moescope.clients.evaluate import Plan, evaluate
from moescope.clients.specimen_train import routed

pytestmark = pytest.mark.engine

ENGINE = ("--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA")
MAX_TOKENS = 6
TOP = 8
# Doses of which none hides behind another.
DOSES = {"experts": "2,6", "strengths": "deactivate,scale-0.5", "headline": "n6/deactivate"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    pairs = list(itertools.permutations(WORDS, 2))[:10]
    conflicts = [
        question(f"q{n}", words=words, messages=user(f" Which {a} is it?", f"The {a} is {b}."))
        for n, words in enumerate(pairs)
        for a, b in [words]
    ]
    plain = question("plain", kind="memory", messages=user("What is the sea?"))
    del plain["document_answer"], plain["responses"]
    useful = [
        *(choice(f"c{n}", choices=[*words, "a winter"]) for n, words in enumerate(pairs[:5])),
        *(
            text(f"t{n}", text=f"The {a} and the {b} of winter.")
            for n, (a, b) in enumerate(pairs[:4])
        ),
        text("told"),
    ]
    return Plan(
        axis="faithfulness",
        items=write_items(folder / "items.jsonl", [*conflicts, plain]),
        utility=write_items(folder / "utility.jsonl", useful),
        ranking=make_ranking(folder / "ranking.parquet"),
        out=folder / "engine",
        num_random=2,
        num_random_dose=1,
        max_tokens=MAX_TOKENS,
        **DOSES,
    )


def with_out(plan, name):
    fields = {field: getattr(plan, field) for field in plan.__slots__}
    return Plan(**fields | {"out": plan.out.with_name(name)})


@pytest.fixture(scope="module")
def model(specimen):
    return specimen("deepseek_v2")


def open_engine(model):
    def open_runner(num_masks):
        return EngineRunner(
            str(model), (*ENGINE, "--max-model-len", "4096"), num_masks=num_masks, top=TOP
        )

    return open_runner


@pytest.fixture(scope="module")
def evaluation(plan, model):
    evaluate(plan, open_engine(model))
    return read_evaluation(plan.out)


def values(evaluation):
    return {
        (row["arm"], row["kind"], row["example_id"], row["metric"]): row["value"]
        for row in evaluation.outcomes.to_pylist()
    }


def answers(evaluation):
    return {
        (row["arm"], row["example_id"]): row["answer"] for row in evaluation.answers.to_pylist()
    }


def route(routing, gate, hidden):
    """What docs/masks.md says of `deactivate`, for a router that does not renormalise."""
    logits = torch.nn.functional.linear(hidden.view(-1, gate.hidden_dim), gate.weight)
    scores = logits.softmax(-1)
    allowed = scores.masked_fill(routing.off[:, len(routing.logits)], -1.0)
    ids = allowed.topk(gate.top_k, dim=-1).indices
    routing.logits.append(logits)
    return logits, scores.gather(-1, ids) * gate.routed_scaling_factor, ids


class Reference:
    """The model in transformers, with a mask's experts switched off in its routers."""

    def __init__(self, model, mask):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.off = torch.zeros((1, 3, 16), dtype=torch.bool)
        for entry in mask["entries"] if mask else ():
            assert entry["action"] == "deactivate"
            self.off[0, entry["layer"] - 1, entry["expert"]] = True

    @torch.no_grad()
    def log_p(self, ids):
        """The logarithms of the probabilities of what comes after each token: [tokens, vocab]."""
        with routed(self.model) as routing:
            routing.start(self.off)
            # Training masks before the softmax; a mask leaves the others' weights as they were.
            routing.route = lambda gate, hidden: route(routing, gate, hidden)
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    def chat(self, item, answer=None):
        turns = [
            {"role": m.role, "content": "".join(p.text for p in m.content)} for m in item.messages
        ]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        said = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        )
        return self.tokenizer(said, add_special_tokens=False)["input_ids"]

    def sum_log_p(self, item, answer, *, end):
        start, ids = len(self.chat(item)), self.chat(item, answer)
        assert ids[:start] == self.chat(item)
        assert ids[-1] == self.tokenizer.eos_token_id
        log_p = self.log_p(ids)
        stop = len(ids) if end else len(ids) - 1
        return float(sum(log_p[n - 1, ids[n]] for n in range(start, stop)))

    def greedy(self, item):
        ids = self.chat(item)
        start = len(ids)
        while len(ids) - start < MAX_TOKENS:
            ids.append(int(self.log_p(ids)[-1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        # vLLM writes no character of which bytes are missing.
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("arm", ["base", "steered", "random-1"])
def test_everything_is_as_transformers_computes_it(evaluation, plan, model, arm):
    mask = next(each["mask"] for each in evaluation.settings["arms"] if each["arm"] == arm)
    assert (mask is None) == (arm == "base")
    reference, found, said = Reference(model, mask), values(evaluation), answers(evaluation)
    base = Reference(model, None)
    for item in read_items(plan.items, ("faithfulness",)).items[:6]:
        assert said[arm, item.example_id] == reference.greedy(item)
        for name, response in item.responses.named().items():
            expected = np.exp(reference.sum_log_p(item, response, end=True))
            value = found[arm, item.kind, item.example_id, f"p_{name}"]
            assert value == pytest.approx(expected, rel=1e-3)
    checked = 0
    for item in read_items(plan.utility, ("utility",)).items:
        key = (arm, item.kind, item.example_id)
        if item.task == "choice":
            sums = [reference.sum_log_p(item, c, end=False) for c in item.choices]
            assert found[*key, "correct"] == (int(np.argmax(sums)) == item.correct)
        elif item.text is not None:
            ids = reference.tokenizer(item.text)["input_ids"]
            here, there = reference.log_p(ids)[:-1], base.log_p(ids)[:-1]
            nll = -np.mean([here[n, token] for n, token in enumerate(ids[1:])])
            assert found[*key, "nll"] == pytest.approx(nll, rel=1e-4)
            whole = float((np.exp(there) * (there - here)).sum(-1).mean())
            # A lower bound of the divergence, and no idle one.
            assert found[*key, "kl"] <= whole + 1e-5
            assert found[*key, "kl"] >= 0.01 * whole
            checked += whole > 1e-3
    assert checked == (0 if arm == "base" else 4)


def test_arms_differ_and_the_folder_says_what_they_were(evaluation):
    found = values(evaluation)
    arms = [arm["arm"] for arm in evaluation.settings["arms"]]
    assert arms[:5] == ["base", "steered", "reverse", "random-0", "random-1"]
    assert {*arms[5:]} == {
        f"{role}/{dose}"
        for role in ("steered", "reverse", "random-0")
        for dose in ("n2/deactivate", "n2/scale-0.5", "n6/scale-0.5")
    }
    rows = [
        tuple(v for k, v in found.items() if k[0] == arm and k[3] == "p_memory") for arm in arms
    ]
    assert len({*rows}) == len(arms)
    assert evaluation.settings["headline"]["experts"] == 6
    assert {row["arm"] for row in evaluation.effects.to_pylist()} == {*arms[1:]}


def test_a_server_gives_the_same(evaluation, plan, model, tmp_path_factory):
    from moescope.clients.eval_server import ServerRunner

    folder = tmp_path_factory.mktemp("served")
    server = Server(folder, model, "--attention-backend", "CPU_MLA", slots=1)
    try:
        server.wait()
        # Masks of others stay, and the global one does not reach any arm.
        assert server.put("calm", 1, layers=(1, 2, 3)).status_code == 200
        assert server.admin.put("/v1/steering", json={"mask": "calm"}).status_code == 200
        ours = with_out(plan, "server")
        evaluate(ours, lambda _: ServerRunner(server.url, top=TOP))
        names = {mask["name"] for mask in server.admin.get("/v1/masks").json()["data"]}
        assert names == {"calm"}

        class Interrupted(ServerRunner):
            def run(self, *arguments):
                for number, found in enumerate(super().run(*arguments)):
                    if number == 90:
                        names = server.admin.get("/v1/masks").json()["data"]
                        assert len(names) > 1
                        raise KeyboardInterrupt
                    yield found

        with pytest.raises(KeyboardInterrupt):
            evaluate(with_out(plan, "interrupted"), lambda _: Interrupted(server.url, top=TOP))
        assert len(server.admin.get("/v1/masks").json()["data"]) == 1
        assert not with_out(plan, "interrupted").out.exists()
    finally:
        server.stop()
    served = read_evaluation(ours.out)
    assert answers(served) == answers(evaluation)
    assert served.settings["arms"] == evaluation.settings["arms"]
    here, there = values(served), values(evaluation)
    assert here.keys() == there.keys()
    assert all(here[key] == pytest.approx(there[key], rel=1e-3, abs=1e-6) for key in there)


def test_a_killed_run_goes_on_where_it_was(evaluation, plan, model, capsys):
    from rich.console import Console

    ours = with_out(plan, "killed")
    part = ours.out.with_name("killed.part")
    command = [sys.executable, "-m", "moescope.clients.cli", "eval", plan.axis, plan.items]
    command += ["--ranking", plan.ranking, "--utility", plan.utility, "--model", model]
    command += ["--out", ours.out, "--max-tokens", MAX_TOKENS, "--kl-top", TOP]
    command += ["--random", 2, "--random-dose", 1, "--experts", DOSES["experts"]]
    command += ["--strengths", DOSES["strengths"], "--headline", DOSES["headline"]]
    command += ["--", *ENGINE, "--max-model-len", 4096, "--max-num-seqs", 8]
    with (plan.out.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    deadline = time.monotonic() + 120
    while len(list(part.glob("eval-*.json"))) < 3:
        assert process.poll() is None, (plan.out.parent / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not ours.out.exists()
    kept = len(list(part.glob("eval-*.json")))
    assert 3 <= kept < len(evaluation.settings["arms"])

    def open_runner(num_masks):
        options = (*ENGINE, "--max-model-len", "4096", "--max-num-seqs", "8")
        return EngineRunner(str(model), options, num_masks=num_masks, top=TOP)

    evaluate(ours, open_runner, Console(width=100))
    assert f"{kept} arms were finished before" in capsys.readouterr().out
    assert not part.exists()
    again = read_evaluation(ours.out)
    assert answers(again) == answers(evaluation)
    here, there = values(again), values(evaluation)
    assert here.keys() == there.keys()
    assert all(here[key] == pytest.approx(there[key], rel=1e-3, abs=1e-6) for key in there)
