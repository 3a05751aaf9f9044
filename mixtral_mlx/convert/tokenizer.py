"""A SentencePiece model → the tokenizer.json and tokenizer_config.json that mlx-lm and transformers read.

mlx-lm splits text wrongly when it has only tokenizer.model, so a folder for it needs these two. Our own prompts never
read them: prompt.py reads the SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..writing import write_whole

# The templates are ours and cover chats without tools. In v1 the markers are written out as text; in v3 they are
# control tokens, after which the normalizer itself writes the space, so that none may stand there.
_TEMPLATE_START = """\
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- if tools %}{{ raise_exception('This template has no tools.') }}{% endif -%}
{{- bos_token -}}
{%- for turn in turns -%}
"""
_TEMPLATE_V1 = (
    _TEMPLATE_START
    + """\
{%- set content = system + '\\n\\n' + turn.content if system and loop.first else turn.content -%}
{%- if turn.role == 'user' %}{{ '[INST] ' + content + ' [/INST]' -}}
{% elif turn.role == 'assistant' %}{{ ' ' + turn.content + eos_token -}}
{% else %}{{ raise_exception('The roles are system, user and assistant, not ' + turn.role + '.') -}}{% endif -%}
{%- endfor -%}"""
)
_TEMPLATE_V3 = (
    _TEMPLATE_START
    + """\
{%- set last = not turns[loop.index:] | selectattr('role', 'equalto', 'user') | list -%}
{%- set content = system + '\\n\\n' + turn.content if system and last else turn.content -%}
{%- if turn.role == 'user' %}{{ '[INST]' + content + '[/INST]' -}}
{% elif turn.role == 'assistant' %}{{ turn.content.rstrip(' ') + eos_token -}}
{% else %}{{ raise_exception('The roles are system, user and assistant, not ' + turn.role + '.') -}}{% endif -%}
{%- endfor -%}"""
)


def write_tokenizer_json(sentencepiece_model: Path, folder: Path) -> None:
    """Write the two files for `sentencepiece_model` into `folder`; ids equal SentencePiece's own.

    Control pieces written out in text become control tokens there, as in every Hugging Face tokenizer. v3's 20
    reserved [REFERENCE_DOC_n] pieces are spelled out instead of matched whole."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model.read_bytes())
    write_whole(folder / "tokenizer.json", _tokenizer(pieces))
    write_whole(folder / "tokenizer_config.json", json.dumps(_config(pieces), ensure_ascii=False, indent=2))


def _tokenizer(pieces: Any) -> str:
    """The tokenizer.json, compact."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    names = [pieces.id_to_piece(token) for token in range(pieces.vocab_size())]
    vocabulary = {name: token for token, name in enumerate(names)}
    unknown, bos = names[pieces.unk_id()], names[pieces.bos_id()]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    special = [token for token in range(len(names)) if pieces.is_control(token) or token == pieces.unk_id()]
    tokenizer.add_special_tokens([AddedToken(names[token], special=True, normalized=False) for token in special])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Exactly this sequence is what mlx-lm streams without decoding everything again at each token.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos_id())]
    )
    text: str = tokenizer.to_str()
    return text


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in the order SentencePiece would join them."""
    found = []
    for name, token in vocabulary.items():
        if pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_byte(token):
            continue
        for cut in range(1, len(name)):
            left, right = vocabulary.get(name[:cut]), vocabulary.get(name[cut:])
            if left is not None and right is not None:
                # Runs of spaces all have one score; SentencePiece then joins from the left as far as it goes, which
                # is what trying the longest first comes to.
                found.append((-pieces.get_score(token), -len(name), left, right))
    names = list(vocabulary)
    return [(names[left], names[right]) for *_, left, right in sorted(found)]


def _config(pieces: Any) -> dict[str, Any]:
    v3 = pieces.is_control(pieces.piece_to_id("[INST]"))
    return {
        # The class that takes tokenizer.json as it is; LlamaTokenizer would build its own and split text wrongly.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": pieces.id_to_piece(pieces.bos_id()),
        "eos_token": pieces.id_to_piece(pieces.eos_id()),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE_V3 if v3 else _TEMPLATE_V1,
    }
