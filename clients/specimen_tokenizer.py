"""The specimens' tokenizer: a byte-level BPE, trained in a moment on the text beside this file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_TEXT = _HERE / "specimen_text.txt"
_CHAT_TEMPLATE = _HERE / "specimen_chat_template.jinja"

VOCAB_SIZE = 1024
MAX_POSITIONS = 4096
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")


def build_tokenizer(lines: Sequence[str] | None = None, vocab_size: int = VOCAB_SIZE) -> Any:
    """A byte-level BPE with a chat template, of up to `vocab_size` entries.

    It is trained on `lines`, or on the text beside this file, which fills `VOCAB_SIZE` entries.

    Any text survives encoding and decoding, and every token knows its characters (offsets). As
    in many real models, encoding puts `BOS` first, the chat template writes its own, and `EOS`
    ends a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *ROLE_MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if lines is None:
        lines = _TEXT.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLE_MARKERS),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
