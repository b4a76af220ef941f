"""A loaded model as vLLM has it: its routers, its shape, and what can't be traced or steered.

A worker may have a part of the model only (a pipeline stage), and its routers may see a part of the
batch only, or other workers' tokens too. The former is put together here; the latter is refused by
name, since rows or masks would be shifted:

    tensor, expert, decode of one batch   every rank routes the whole batch, in the same way
    data parallel                         every replica routes its own batch, ...
        with modular kernels              ... before tokens go to other ranks
        with others (naive dispatch)      ... and all other replicas' too             refused
        and tensor and expert parallel    each rank routes its share of the batch     refused
          (sequence-parallel MoE)
    prefill context parallel              likewise                                    refused
    dual-batch overlap                    a step's batch is routed in pieces          refused
"""

from dataclasses import dataclass, replace
from typing import Any

from moescope.tracer.errors import UnsupportedModelError
from moescope.tracer.format import ModelFacts, MoeShape, Stage
from moescope.tracer.mask import RouterSpec

# By what the name of the experts' class contains: a backend whose routing is modular, for weights
# of that kind (fused_moe/oracle/*.py list those that there are).
MODULAR_BACKENDS = {
    "nvfp4": "flashinfer_cutlass (or marlin)",
    "mxfp4": "marlin",
    "mxint4": "marlin",
    "fp8": "triton",
    "bf16": "triton",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the engine a worker is.

    `facts` are the whole model's. `own` has the layers of this worker's `stage`, which are all of
    them if that is None; the first one is layer `first` of the whole. `records`: of the ranks that
    route alike, this is the one that records.
    """

    facts: ModelFacts
    own: ModelFacts
    first: int
    stage: Stage | None
    records: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one pipeline stage knows of its layers."""

    refusal: str | None
    layers: tuple[int, ...] = ()
    shapes: frozenset[tuple[int, int]] = frozenset()
    scoring: str = ""
    renormalize: bool = False
    spec: RouterSpec | None = None


def find_runners(model: Any) -> list[Any]:
    """The model's MoE layers, by their number; UnsupportedModelError if one can't be traced.

    The layers of a draft model are not among them: it is a model of its own.
    """
    runners = _runners(model)
    if not runners:
        raise UnsupportedModelError(_no_layers(model))
    return runners


def locate(model: Any, config: Any, engine: str) -> tuple[list[Any], Place, RouterSpec]:
    """This worker's MoE layers, its place, and how the routers of the whole model score.

    UnsupportedModelError, in every stage alike, if one stage's layers can't be traced.
    """
    from vllm.distributed.parallel_state import get_tp_group

    runners: list[Any] = []
    try:
        check_config(config)
        runners = _runners(model)
        seen = _look(runners)
    except UnsupportedModelError as error:
        seen = _Seen(str(error))
    number, stages = _all_stages(seen)
    refusals = [stage.refusal for stage in stages if stage.refusal is not None]
    if refusals:
        raise UnsupportedModelError(refusals[0])
    with_layers = [stage for stage in stages if stage.layers]
    if not with_layers:
        raise UnsupportedModelError(_no_layers(model))
    facts, spec = _facts(with_layers, config, engine), with_layers[0].spec
    assert spec is not None
    before = [stage for stage in stages[:number] if stage.layers]
    stage = Stage(len(before) + 1, len(with_layers), seen.layers) if seen.layers else None
    place = Place(
        facts=facts,
        own=replace(facts, shape=replace(facts.shape, layers=seen.layers)),
        first=sum(len(stage.layers) for stage in before),
        stage=stage if len(with_layers) > 1 else None,
        # A stage without such layers has nothing to record.
        records=get_tp_group().rank_in_group == 0 and bool(seen.layers),
    )
    return runners, place, spec


def check_config(config: Any) -> None:
    """UnsupportedModelError, by name, if this engine's steps can't be told apart by request."""
    parallel, speculative = config.parallel_config, config.speculative_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModelError(
                f"tracing with {name} = {getattr(parallel, name)} is not supported: set it to 1"
            )
    if parallel.use_ubatching:
        raise UnsupportedModelError(
            "dual-batch overlap (--enable-dbo, --ubatch-size) routes a step's batch in pieces, "
            "which moescope can't tell apart: switch it off"
        )
    if parallel.enable_elastic_ep:
        raise UnsupportedModelError(
            "elastic expert parallelism (--enable-elastic-ep) changes the engine's workers while "
            "it runs, which moescope does not follow: switch it off"
        )
    if config.cache_config.kv_sharing_fast_prefill:
        raise UnsupportedModelError(
            "--kv-sharing-fast-prefill lets the last layers see a part of the prompt only, so that "
            "its tokens have no routing there: switch it off"
        )
    if speculative is None:
        return
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError(
            f"speculative decoding with pipeline_parallel_size = {parallel.pipeline_parallel_size} "
            "is not supported: only the last stage knows which drafts were rejected. Leave out "
            "--speculative-config, or set --pipeline-parallel-size 1"
        )
    if speculative.enable_adaptive_verification:
        raise UnsupportedModelError(
            "adaptive verification (enable_adaptive_verification in --speculative-config) decides "
            "on the GPU how many drafts of each request are computed, which moescope can't follow: "
            "set it to false"
        )


def router_spec(router: Any) -> RouterSpec:
    """How a router scores and chooses, as far as masks need to know."""
    custom = getattr(router, "custom_routing_function", None) is not None
    hashed = getattr(router, "_hash_indices_table", None) is not None
    scoring: Any = getattr(router, "scoring_func", "softmax")
    grouped = getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group"))
    biased = getattr(router, "e_score_correction_bias", None) is not None
    return RouterSpec(
        scoring="hash" if hashed else "custom" if custom else scoring,
        renormalize=scoring == "sqrtsoftplus" or bool(getattr(router, "renormalize", False)),
        num_groups=int(router.num_expert_group) if grouped else 1,
        topk_groups=int(router.topk_group) if grouped else 1,
        correction_bias=biased,
        # Plain softmax routers hold a factor and do not apply it.
        scaling=float(getattr(router, "routed_scaling_factor", 1.0)) if grouped or biased else 1.0,
    )


def _no_layers(model: Any) -> str:
    return (
        f"{type(model).__name__} has no mixture-of-experts layers that vLLM routes, so there "
        "is no routing to trace: choose a mixture-of-experts model"
    )


def _runners(model: Any) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners = sorted(
        (module for module in model.modules() if isinstance(module, MoERunner)),
        key=lambda runner: runner.layer_id,
    )
    for runner in runners:
        _check_runner(runner)
    return runners


def _check_runner(runner: Any) -> None:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    layer, moe = runner.layer_id, runner.moe_config
    if runner.is_monolithic:
        experts = _experts_class(runner)
        kind = next((k for k in MODULAR_BACKENDS if k in experts.lower()), None)
        remedy = (
            "with another --moe-backend or an unquantised model"
            if kind is None
            else f"with --moe-backend {MODULAR_BACKENDS[kind]}"
        )
        raise UnsupportedModelError(
            f"layer {layer} chooses its experts inside a monolithic kernel ({experts}), where the "
            f"routing can't be seen: start vLLM {remedy}"
        )
    if not isinstance(runner.router, BaseRouter):
        raise UnsupportedModelError(
            f"layer {layer} routes by {type(runner.router).__name__}, which moescope does not know"
        )
    if getattr(runner.router, "num_fused_shared_experts", 0):
        raise UnsupportedModelError(
            f"layer {layer} routes its shared experts together with the others (fused shared "
            "experts), which moescope can't tell apart: switch that off"
        )
    if moe.is_sequence_parallel:
        raise UnsupportedModelError(
            f"layer {layer} is sequence-parallel: with tensor, data and expert parallelism "
            "together each rank routes a share of its replica's tokens, which moescope does not "
            "put together. Set --tensor-parallel-size 1 (and --data-parallel-size higher), or "
            "leave out --enable-expert-parallel"
        )
    if runner.do_naive_dispatch_combine:
        raise UnsupportedModelError(
            f"layer {layer} ({type(runner._quant_method).__name__}) routes the tokens of all "
            f"data-parallel replicas on each of them: set data_parallel_size = {moe.dp_size} to 1 "
            "and run several engines that write to one store, or choose another --moe-backend"
        )


def _experts_class(runner: Any) -> str:
    """The kernel's class if vLLM tells it, or else the quantisation's."""
    method = runner._quant_method
    kernel = getattr(getattr(method, "moe_kernel", None), "impl", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is not None:
        return type(experts).__name__
    return str(getattr(getattr(method, "experts_cls", type(method)), "__name__", type(method)))


def _look(runners: list[Any]) -> _Seen:
    if not runners:
        return _Seen(None)
    return _Seen(
        None,
        layers=tuple(int(runner.layer_id) for runner in runners),
        # Logical experts: load balancing may keep several copies of one.
        shapes=frozenset(
            (int(r.moe_config.num_logical_experts), int(r.router.top_k)) for r in runners
        ),
        scoring=str(getattr(runners[0].router, "scoring_func", "softmax")),
        renormalize=bool(getattr(runners[0].router, "renormalize", False)),
        spec=router_spec(runners[0].router),
    )


def _all_stages(mine: _Seen) -> tuple[int, list[_Seen]]:
    """The number of this worker's pipeline stage, from 0, and what all stages have seen."""
    import torch.distributed
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    found: list[Any] = [mine]
    if group.world_size > 1:
        found = [None] * group.world_size
        torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    return group.rank_in_group, found


def _facts(stages: list[_Seen], config: Any, engine: str) -> ModelFacts:
    shapes = sorted(frozenset().union(*(stage.shapes for stage in stages)))
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"the MoE layers differ in (experts, top-k): {shapes}; only models with one shape in "
            "all layers can be traced"
        )
    [(num_experts, top_k)] = shapes
    layers = tuple(layer for stage in stages for layer in stage.layers)
    model = config.model_config
    return ModelFacts(
        model=str(model.model),
        revision=model.revision,
        architecture=model.architectures[0],
        dtype=str(model.dtype).removeprefix("torch."),
        shape=MoeShape(layers, num_experts, top_k),
        scoring=stages[0].scoring,
        renormalize=stages[0].renormalize,
        engine=engine,
    )
