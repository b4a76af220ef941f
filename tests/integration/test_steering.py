"""Masks proven by tracing again under them, on real engines."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from engines import as_prompts, open_engine, traced_rows

from moescope.analysis import open_store
from moescope.tracer import Mask, TraceRequest, masks, steer, trace
from moescope.tracer.errors import InputError, SlotsFullError
from moescope.tracer.store import read_manifest

pytestmark = pytest.mark.engine

LENGTH = 12


def random_mask(name, shape, rng, actions=("deactivate", "activate", "scale", "bias")):
    """A sound mask with a few experts of every layer."""
    entries = []
    for layer in shape.layers:
        experts = rng.permutation(shape.num_experts)[: shape.top_k + 2]
        num_activated = 0
        for expert in experts.tolist():
            action = str(rng.choice(actions))
            if action == "activate":
                num_activated += 1
                if num_activated > shape.top_k - 1:
                    action = "scale"
            entry = {"layer": layer, "expert": expert, "action": action}
            if action == "scale":
                entry["value"] = 0.5
            if action == "bias":
                entry["value"] = 1.0
            entries.append(entry)
    return Mask.model_validate({"name": name, "entries": entries})


def violations(mask, shape, experts):
    """Tokens that chose a deactivated expert, or did not choose an activated one."""
    count = 0
    for entry in mask.entries:
        chosen = (experts[:, shape.layers.index(entry.layer)] == entry.expert).any(-1)
        count += int(chosen.sum()) if entry.action == "deactivate" else 0
        count += int((~chosen).sum()) if entry.action == "activate" else 0
    return count


def sampling(**wishes):
    from vllm import SamplingParams

    extra_args = TraceRequest(**wishes).extra_args()
    return SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True, extra_args=extra_args)


@pytest.mark.parametrize(
    ("arch", "compiled"),
    [
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        ("mixtral", False),
        ("olmoe", False),
        ("deepseek_v2", False),
        ("deepseek_v2_group", False),
        ("deepseek_v3", False),
        ("glm4_moe", False),
    ],
)
def test_a_trace_under_masks_shows_no_violation(specimen, prompts, tmp_path, arch, compiled):
    rng = np.random.default_rng(1)
    with open_engine(specimen(arch), enforce_eager=not compiled) as llm:
        with trace(llm, store=tmp_path):
            pass
        shape = read_manifest(tmp_path).shape
        given = [random_mask(f"m{i}", shape, rng) for i in range(8)]
        params = [
            sampling(example_id=f"{i}", mask=given[i % 8].name) for i in range(len(prompts[:16]))
        ]
        with trace(llm, store=tmp_path), masks(llm, *given):
            llm.generate(as_prompts(prompts[:16]), params, use_tqdm=False)
    rows = traced_rows(tmp_path)
    assert len(rows) == 16
    checked = 0
    for key, (_, experts, weights) in rows.items():
        assert violations(given[int(key) % 8], shape, experts) == 0
        assert all(len(set(ids)) == shape.top_k for ids in experts.reshape(-1, shape.top_k))
        assert np.isfinite(weights).all()
        checked += len(experts)
    assert checked > 500
    stored = open_store(tmp_path).execute("SELECT DISTINCT mask FROM tokens ORDER BY 1").fetchall()
    assert stored == [(f"m{i}",) for i in range(8)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16, "enable_chunked_prefill": True},
        {"num_gpu_blocks_override": 17, "block_size": 32, "max_num_seqs": 16},
    ],
    ids=["one batch", "chunked", "preempted"],
)
def test_masks_in_one_batch_are_each_as_alone(specimen, prompts, tmp_path, options):
    rng = np.random.default_rng(2)
    model, some = specimen("qwen3_moe"), prompts[:16]
    outputs = {}
    with open_engine(model, max_num_seqs=1) as llm:
        with trace(llm, store=tmp_path / "facts"):
            pass
        shape = read_manifest(tmp_path / "facts").shape
        given = [random_mask(f"m{i}", shape, rng) for i in range(8)]
        # 8 with masks, 8 without.
        params = [sampling(example_id=f"{i}", mask=f"m{i}" if i < 8 else None) for i in range(16)]
        with trace(llm, store=tmp_path / "alone"), masks(llm, *given):
            for prompt, one in zip(some, params, strict=True):
                [outputs[one.extra_args["moescope_example_id"]]] = llm.generate(
                    as_prompts([prompt]), one, use_tqdm=False
                )
    with open_engine(model, disable_log_stats=False, **options) as llm:
        with trace(llm, store=tmp_path / "batch"), masks(llm, *given):
            together = llm.generate(as_prompts(some), params, use_tqdm=False)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert (preemptions > 0) == ("num_gpu_blocks_override" in options)
    for i, output in enumerate(together):
        assert output.outputs[0].token_ids == outputs[f"{i}"].outputs[0].token_ids
    alone, batch = traced_rows(tmp_path / "alone"), traced_rows(tmp_path / "batch")
    differ = total = 0
    for key, (tokens, experts, _) in alone.items():
        assert batch[key][0] == tokens
        same = (np.sort(experts, -1) == np.sort(batch[key][1], -1)).all(-1)
        differ, total = differ + (~same).sum(), total + same.size
    assert differ <= 0.001 * total
    # And the requests without a mask are those of an engine without moescope.
    for output, other in zip(together[8:], plain_outputs(model, some[8:]), strict=True):
        assert list(output.outputs[0].token_ids) == other


def plain_outputs(model, prompts):
    """Greedy token ids of a vLLM that does not load moescope, in a process of its own."""
    script = textwrap.dedent("""
        import json, sys
        from vllm import LLM, SamplingParams
        model, prompts, length = json.load(sys.stdin)
        llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512)
        assert not any(name.startswith("moescope") for name in sys.modules)
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([str(model), prompts, LENGTH]),
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_composed_masks_do_not_read_each_others_cache(specimen, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_OWN_MASK", "compose")
    model, prompt = specimen("qwen3_moe"), as_prompts([prompts[0] + prompts[61]])
    with open_engine(model) as llm, trace(llm, store=tmp_path):
        pass
    shape, rng = read_manifest(tmp_path).shape, np.random.default_rng(5)
    given = [random_mask(n, shape, rng, ("deactivate", "scale")) for n in ("own", "g1", "g2")]
    own, *globals_ = given
    off = {"layer": 0, "expert": 0, "action": "deactivate"}
    paper = Mask.model_validate({"name": "paper", "entries": [off], "mode": "steermoe"})
    refused = pytest.raises(InputError, match="global mask paper is of mode steermoe and mask own")

    def answers(llm):
        """{(global, own): [(tokens, whether some were cached), the same once more]}."""
        got = {}
        with masks(llm, own):
            for base in (*globals_, None):
                with steer(llm, base):
                    for name in ("own", None, "none"):
                        outputs = [
                            llm.generate(prompt, sampling(trace=False, mask=name), use_tqdm=False)[
                                0
                            ]
                            for _ in range(2)
                        ]
                        got[base and base.name, name] = [
                            (list(o.outputs[0].token_ids), bool(o.num_cached_tokens))
                            for o in outputs
                        ]
                    with refused, steer(llm, paper):
                        pass
        return got

    with open_engine(model, enable_prefix_caching=True, block_size=32) as llm:
        warm = answers(llm)
        with steer(llm, paper), refused, masks(llm, own):
            pass
    with open_engine(model) as llm:
        cold = answers(llm)
    for key, ((first, hit), (again, hit_again)) in warm.items():
        assert first == again == cold[key][0][0]
        # What wants no mask is one and the same under all of them.
        assert hit == (key[1] == "none" and key[0] != "g1")
        assert hit_again
    assert len({tuple(first) for (first, _), _ in warm.values()}) == 6


@pytest.fixture(scope="module")
def cached(specimen):
    with open_engine(specimen("qwen3_moe"), enable_prefix_caching=True, block_size=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def two_masks(cached, tmp_path_factory):
    store = tmp_path_factory.mktemp("facts")
    with trace(cached, store=store):
        pass
    rng = np.random.default_rng(3)
    shape = read_manifest(store).shape
    return [random_mask(name, shape, rng, ("deactivate", "scale")) for name in ("A", "B")]


def test_the_prefix_cache_does_not_leak_across_masks(cached, two_masks, prompts):
    prompt = as_prompts([prompts[0] + prompts[61]])
    got, hits = [], []
    with masks(cached, *two_masks):
        for mask in ("A", None, "B", "A", "none", "none"):
            [output] = cached.generate(prompt, sampling(trace=False, mask=mask), use_tqdm=False)
            got.append(output.outputs[0].token_ids)
            hits.append(output.num_cached_tokens)
    assert hits[:3] == [0, 0, 0]
    assert hits[3] > 0  # the second A reads what the first has left
    assert hits[4] == 0
    assert hits[5] > 0
    assert got[0] == got[3]
    assert got[1] == got[4] == got[5]
    assert got[0] != got[2] != got[1]


def test_another_mask_of_the_same_name_does_not_read_its_cache(cached, two_masks, prompts):
    a, b = two_masks
    prompt = as_prompts([prompts[5] + prompts[62]])
    got = []
    for mask in (a, b.model_copy(update={"name": "A"}), a):
        with masks(cached, mask):
            [output] = cached.generate(prompt, sampling(trace=False, mask="A"), use_tqdm=False)
        got.append((output.outputs[0].token_ids, output.num_cached_tokens > 0))
    assert [hit for _, hit in got] == [False, False, True]
    assert got[0][0] == got[2][0] != got[1][0]


def test_a_global_mask_is_in_force_in_its_block_and_own_ones_replace_it(
    cached, two_masks, prompts, tmp_path
):
    a, b = two_masks
    some = as_prompts(prompts[20:24])
    with trace(cached, store=tmp_path), masks(cached, b):
        cached.generate(some, sampling(example_id="before"), use_tqdm=False)
        with steer(cached, a):
            cached.generate(some, sampling(example_id="global"), use_tqdm=False)
            cached.generate(some, sampling(example_id="own", mask="B"), use_tqdm=False)
            cached.generate(some, sampling(example_id="none", mask="none"), use_tqdm=False)
        cached.generate(some, sampling(example_id="after"), use_tqdm=False)
    shape = read_manifest(tmp_path).shape
    found = {}
    for example, mask, experts in (
        open_store(tmp_path)
        .execute(
            "SELECT example_id, tokens.mask, list(expert_ids) FROM tokens "
            "JOIN requests USING (request_id) GROUP BY ALL"
        )
        .fetchall()
    ):
        experts = np.array(experts).reshape(-1, len(shape.layers), shape.top_k)
        found[example, mask] = [violations(m, shape, experts) for m in (a, b)]
    assert found.keys() == {
        ("before", None),
        ("global", "A"),
        ("own", "B"),
        ("none", "none"),
        ("after", None),
    }
    assert found["global", "A"][0] == 0 < found["global", "A"][1]
    assert found["own", "B"][1] == 0 < found["own", "B"][0]
    for free in (("before", None), ("none", "none"), ("after", None)):
        assert min(found[free]) > 0


def test_a_global_change_reaches_a_running_request_at_its_next_step(
    cached, two_masks, prompts, tmp_path
):
    a, _ = two_masks
    with trace(cached, store=tmp_path):
        cached.enqueue(as_prompts(prompts[30:31]), sampling(example_id="runs"), use_tqdm=False)
        for _ in range(4):
            cached.llm_engine.step()
        with steer(cached, a):
            for _ in range(3):
                cached.llm_engine.step()
        while cached.llm_engine.has_unfinished_requests():
            cached.llm_engine.step()
    rows = (
        open_store(tmp_path)
        .execute("SELECT mask, expert_ids FROM tokens ORDER BY position")
        .fetchall()
    )
    keys = [mask for mask, _ in rows]
    first = keys.index("A")
    assert keys[first : first + 3] == ["A"] * 3
    assert "A" not in keys[:first] + keys[first + 3 :]
    shape = read_manifest(tmp_path).shape
    under = np.array([experts for mask, experts in rows if mask == "A"])
    assert violations(a, shape, under.reshape(3, len(shape.layers), shape.top_k)) == 0


def test_a_request_that_wants_no_mask_has_none_when_a_global_one_comes(cached, two_masks, prompts):
    a, _ = two_masks
    prompt = as_prompts(prompts[33:34])
    outputs = {}
    for steered in (False, True):
        cached.enqueue(prompt, sampling(trace=False, mask="none"), use_tqdm=False)
        for _ in range(3):  # it begins while nothing is steered
            cached.llm_engine.step()
        with steer(cached, a if steered else None):
            while cached.llm_engine.has_unfinished_requests():
                for output in cached.llm_engine.step():
                    outputs[steered] = output.outputs[0].token_ids
    assert outputs[True] == outputs[False]
    with steer(cached, a):
        [other] = cached.generate(prompt, sampling(trace=False), use_tqdm=False)
    assert other.outputs[0].token_ids != outputs[True]


def test_what_can_not_be_done_is_refused(cached, two_masks, prompts):
    a, b = two_masks
    with pytest.raises(InputError, match="'A' is not loaded"):
        cached.generate(as_prompts(prompts[:1]), sampling(trace=False, mask="A"), use_tqdm=False)
    with pytest.raises(InputError, match="one name"), masks(cached, a, a):
        pass
    many = [b.model_copy(update={"name": f"b{i}"}) for i in range(17)]
    with pytest.raises(SlotsFullError, match="17 masks for 16 slots"), masks(cached, *many):
        pass
    entry = {"layer": 99, "expert": 0, "action": "deactivate"}
    bad = Mask.model_validate({"name": "bad", "entries": [entry]})
    with pytest.raises(InputError, match="99"), steer(cached, bad):
        pass
    cached.generate(as_prompts(prompts[:1]), sampling(trace=False), use_tqdm=False)
