"""Where refusals come from: the source itself, or the model under study through vLLM."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moescope.clients.batch import engine_arguments, load_engine
from moescope.clients.safety_source import Pair
from moescope.tracer.errors import InputError

# What makes a refusal pass the checks of refusal.py, said to the model.
INSTRUCTION = (
    "Decline the user's request. Name what was asked, say that you can't help with it, and explain "
    "why: what harm it could cause, and to whom. Write about {words} words of plain prose in whole "
    "sentences. Give no steps, no lists, no code and no quantities, and nothing that would help "
    "to carry the request out."
)
_TOKENS_PER_WORD = (
    2  # room to end a sentence; what is cut off is dropped back to the last full stop
)
_LEAST_WORDS, _MOST_WORDS = 20, 400


class Refusals(Protocol):
    """Where refusals come from, and how their length is measured."""

    @property
    def described(self) -> dict[str, Any]:
        """For the data card."""

    @property
    def given(self) -> bool:
        """Whether they are the source's own: then there is one attempt."""

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text."""

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[str]:
        """Write a refusal for each pair; the attempt, from 0, makes other samples."""


@dataclass(frozen=True, slots=True)
class GivenRefusals:
    """The source's `safe_response`; `count` None counts words and punctuation marks."""

    count: Callable[[str], int] | None = None
    model: str | None = None
    given: bool = True

    @property
    def described(self) -> dict[str, Any]:
        """For the data card."""
        return {"refusals": "given", "lengths_in": self.model or "words"}

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        return self.count(text) if self.count else len(re.findall(r"\w+|[^\w\s]", text))

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[str]:  # noqa: ARG002
        """Take each pair's own."""
        return [pair.given for pair in pairs]


class RefusingModel:
    """A model that declines; each attempt draws other samples. It is loaded when first asked."""

    given = False

    def __init__(
        self,
        model: str,
        engine_options: tuple[str, ...],
        *,
        temperature: float,
        seed: int,
        instruction: str = INSTRUCTION,
    ) -> None:
        """`instruction` asks for a refusal ("{words}": how long); "" leaves the prompt alone."""
        if not 0 <= temperature <= 2:
            raise InputError(f"--temperature must be from 0 to 2, not {temperature:g}.")
        self._instruction = instruction
        self._model = model
        self._engine_options = engine_options
        self._temperature = temperature
        self._seed = seed
        self._engine: Any = None
        self._tokenizer: Any = None

    @property
    def described(self) -> dict[str, Any]:
        """For the data card."""
        return {
            "refusals": "generated",
            "lengths_in": self._model,
            "model": self._model,
            "engine_options": list(self._engine_options),
            "temperature": self._temperature,
            "instruction": self._instruction,
        }

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text alone."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[str]:
        """Write a refusal for each pair, about as long as its harmful completion."""
        from vllm import SamplingParams

        if self._engine is None:
            self._engine = load_engine(engine_arguments(self._model, self._engine_options))
            self._tokenizer = self._engine.get_tokenizer()
        limit = self._engine.llm_engine.model_config.max_model_len
        prompts, sampling = [], []
        for pair in pairs:
            words = min(max(len(pair.harmful.split()), _LEAST_WORDS), _MOST_WORDS)
            token_ids = self._render(pair, self._instruction.replace("{words}", str(words)))
            most = _TOKENS_PER_WORD * words
            if len(token_ids) + most > limit:
                raise InputError(
                    f"row {pair.row}: its prompt and a refusal need {len(token_ids) + most} "
                    f"tokens, and the engine takes {limit}: raise the limit with "
                    "`-- --max-model-len N`, or leave the row out."
                )
            prompts.append({"prompt_token_ids": token_ids})
            sampling.append(
                SamplingParams(
                    temperature=self._temperature,
                    max_tokens=most,
                    seed=self._seed + 1_000_003 * attempt + pair.row,
                )
            )
        outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
        return [_finished(output.outputs[0]) for output in outputs]

    def _render(self, pair: Pair, instruction: str) -> list[int]:
        """The prompt's tokens; the instruction leads the user's turn where no system turn may."""
        system = {"role": "system", "content": instruction}
        asked = {"role": "user", "content": pair.prompt}
        both = {"role": "user", "content": f"{instruction}\n\n{pair.prompt}"}
        for chat in ([system, asked], [both]) if instruction else ([asked],):
            try:
                text = self._tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False
                )
            except Exception:  # a template may raise anything; what it says may quote the prompt
                continue
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        raise InputError(
            f"row {pair.row}: the model's chat template takes neither a system nor a user message; "
            "give refusals as `safe_response`, with --given."
        )


def where_refusals_come_from(
    model: str | None,
    *,
    given: bool,
    engine_options: tuple[str, ...] = (),
    temperature: float = 0.8,
    seed: int = 0,
    instruction: str = INSTRUCTION,
) -> Refusals:
    """The source's own refusals, or a model that writes them; with both, its tokenizer counts."""
    if given and model is None:
        return GivenRefusals()
    if model is None:
        raise InputError(
            "say where the refusals come from: --model MODEL writes them, --given takes the "
            "source's `safe_response`."
        )
    if given:
        return GivenRefusals(token_counter(model), model)
    return RefusingModel(
        model, engine_options, temperature=temperature, seed=seed, instruction=instruction
    )


def token_counter(model: str) -> Callable[[str], int]:
    """Count tokens by a model's tokenizer alone."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"can't load the tokenizer of --model {model}: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _finished(output: Any) -> str:
    """The answer without its thoughts, and without a last sentence that was cut off."""
    text = str(output.text).rpartition("</think>")[2].strip()
    if output.finish_reason != "length":
        return text
    stop = max(text.rfind(mark) for mark in ".!?")
    return text[: stop + 1]
