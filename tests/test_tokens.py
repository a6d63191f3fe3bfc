"""Learned tokens in adapter files: they join the tokenizers with the adapter, and leave no trace when it goes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import (
    POOLED_WIDTH,
    TEXT_WIDTH,
    tiny_pipeline,
    tiny_tokenizer,
)
from token_adapters import (
    LONG_TOKEN,
    METADATA,
    PIPELINES,
    PLAIN,
    TOKEN,
    adapter_file,
    encoded,
    hidden,
    learned,
    live_adapter,
    rows,
    sdxl_pipeline,
    text_components,
    trace,
    with_longer_table,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from svft_diffusion import (
    SVDiffConfig,
    add_tokens,
    load_adapter,
    save_adapter,
    set_adapters,
    swap_adapter,
    unload_adapter,
)
from svft_diffusion.adapters import (
    adapter_state,
    add_training_adapter,
    load_adapter_state,
    loaded_adapters,
    token_parameters,
)
from svft_diffusion.adapters import runtime as adapter_runtime
from svft_diffusion.adapters.injection import remove
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.merging import merge_adapters
from svft_diffusion.files import digests_of_pipeline, metadata_of, read_adapter, write_adapter

SHARED = "text_encoder.text_model.embeddings.token_embedding"


@pytest.mark.parametrize("family", PIPELINES)
def test_a_loaded_token_has_the_rows_of_its_file_and_unloading_leaves_no_trace(family: str, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors", family, LONG_TOKEN)
    pipe = PIPELINES[family]()
    before = trace(pipe)
    tables = learned(pipe, LONG_TOKEN)
    longer = {component: with_longer_table(getattr(pipe, component), table) for component, table in tables.items()}
    load_adapter(pipe, file, "dog")
    for component in text_components(pipe):
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        prompt = pipe.maybe_convert_prompt("a photo of <robo> on the beach", tokenizer)
        assert prompt == "a photo of <robo> <robo>_1 on the beach"
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        first = before[component][0]
        assert ids[0, 4:6].tolist() == [first, first + 1]
        assert torch.equal(hidden(pipe, prompt, component), longer[component](ids).last_hidden_state)
        assert hidden(pipe, PLAIN, component).tolist() == before[component][-1]
    unload_adapter(pipe, "dog")
    assert trace(pipe) == before


def test_a_picture_with_the_token_is_another_one_even_at_weight_0(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}

    def picture(pipe: DiffusionPipeline, prompt: str) -> Tensor:
        return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(3), **options).images)

    pipe = sdxl_pipeline()
    plain, spelled = picture(pipe, PLAIN), picture(pipe, "a photo of <robo>")
    load_adapter(pipe, adapter_file(tmp_path / "dog.safetensors", "sdxl"), "dog")
    set_adapters(pipe, {"dog": 0.0})
    assert torch.equal(picture(pipe, PLAIN), plain)
    assert not torch.equal(picture(pipe, "a photo of <robo>"), spelled)


@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_what_was_loaded_gives_the_same_bytes(value_dtype: str, base_dtype: torch.dtype, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors", "sdxl", LONG_TOKEN, value_dtype=value_dtype)
    header, tensors = read_adapter(file)
    assert header.tokens == {"text_encoder": list(LONG_TOKEN), "text_encoder_2": list(LONG_TOKEN)}
    expected = torch.stack([rows(POOLED_WIDTH, 5), rows(POOLED_WIDTH, 6)])
    assert torch.equal(tensors["text_encoder_2.tokens"], expected.to(getattr(torch, value_dtype)).float())
    pipe = sdxl_pipeline()
    load_adapter(pipe, file, "dog")
    pipe.to(base_dtype)  # trained numbers stay as they are
    metadata = dataclasses.replace(metadata_of(header), base_digests=header.base.digests)
    again = save_adapter(pipe, "dog", tmp_path / "again.safetensors", metadata=metadata)
    assert again.read_bytes() == file.read_bytes()
    assert hidden(pipe, "a photo of <robo>").dtype == base_dtype


def test_an_adapter_around_the_table_and_tokens_beside_it(tmp_path: Path) -> None:
    config = SVDiffConfig(targets="all")
    file = adapter_file(tmp_path / "dog.safetensors", config=config)
    assert f"{SHARED}.values" in read_adapter(file)[1]
    pipe = tiny_pipeline()
    before, digests = trace(pipe), digests_of_pipeline(pipe, [SHARED])
    without = tmp_path / "without.safetensors"
    live_adapter(pipe, "plain", config, seed=5)
    save_adapter(pipe, "plain", without, metadata=METADATA)
    unload_adapter(pipe, "plain")
    load_adapter(pipe, without, "dog")
    expected = hidden(pipe, PLAIN)
    assert expected.tolist() != before["text_encoder"][-1]
    unload_adapter(pipe, "dog")

    load_adapter(pipe, file, "dog")
    assert digests_of_pipeline(pipe, [SHARED]) == digests
    assert torch.equal(hidden(pipe, PLAIN), expected)
    with_token = hidden(pipe, "a photo of <robo>")
    assert torch.equal(with_token[:, :4], hidden(pipe, "a photo of dog")[:, :4])  # text is causal
    load_adapter(pipe, without, "second")  # goes around the table while the token is there
    assert not torch.equal(hidden(pipe, "a photo of <robo>"), with_token)
    unload_adapter(pipe, "second")
    assert torch.equal(hidden(pipe, "a photo of <robo>"), with_token)
    unload_adapter(pipe, "dog")
    assert trace(pipe) == before


def test_adapters_with_several_tokens_come_and_go_in_any_order(tmp_path: Path) -> None:
    files = {
        name: adapter_file(tmp_path / f"{name}.safetensors", names=(f"<{name}>", f"<{name}>_1"), seed=seed)
        for name, seed in (("one", 11), ("two", 21), ("three", 31))
    }
    pipe = tiny_pipeline()
    before = trace(pipe)
    alone = {}
    for name, file in files.items():
        load_adapter(pipe, file, name)
        alone[name] = hidden(pipe, f"a <{name}> on <{name}>_1")
        unload_adapter(pipe, name)
    for name, file in files.items():
        load_adapter(pipe, file, name)
    unload_adapter(pipe, "two")
    for name in ("one", "three"):
        assert torch.equal(hidden(pipe, f"a <{name}> on <{name}>_1"), alone[name])
    assert "<two>" not in pipe.tokenizer.tokenize("a <two>")
    load_adapter(pipe, files["two"], "two")
    unload_adapter(pipe, "one")
    for name in ("two", "three"):
        assert torch.equal(hidden(pipe, f"a <{name}> on <{name}>_1"), alone[name])
    for name in ("three", "two"):
        unload_adapter(pipe, name)
    assert trace(pipe) == before


REFUSED = {
    "token of another adapter": ((TOKEN,), "token <robo> belongs to adapter 'first'"),
    "the same to a tokenizer without case": (("<ROBO>",), "token <ROBO> is known"),
    "ordinary word": (("dog",), "token dog is known"),
    "special token": (("<|endoftext|>",), "is known"),
    "two words": (("<a> <b>",), "one word without spaces"),
    "differ in case": (("<New>", "<new>"), "differ in case alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_file_changes_nothing(case: str, tmp_path: Path) -> None:
    names, message = REFUSED[case]
    header, tensors = read_adapter(adapter_file(tmp_path / "made.safetensors", names=("<x>", "<y>")[: len(names)]))
    file = tmp_path / "bad.safetensors"
    write_adapter(file, dataclasses.replace(header, tokens={"text_encoder": list(names)}), tensors)
    pipe = tiny_pipeline()
    load_adapter(pipe, adapter_file(tmp_path / "first.safetensors"), "first")
    before = trace(pipe)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(pipe, file, "second")
    assert "\n" not in str(caught.value)
    assert trace(pipe) == before


def test_a_load_that_fails_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = adapter_file(tmp_path / "dog.safetensors", "sdxl")
    pipe = sdxl_pipeline()
    before = trace(pipe)

    def interrupt(*_: object) -> None:
        assert len(pipe.tokenizer_2) == before["text_encoder_2"][0] + 1
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_runtime, "judge_update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(pipe, file, "dog")
    assert trace(pipe) == before


def test_the_wrong_width_a_missing_encoder_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors", "sdxl")
    pipe = sdxl_pipeline()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    with pytest.raises(UserError, match="need its tokenizer"):
        load_adapter(models, file, "dog")
    del models["text_encoder_2"]
    with pytest.raises(UserError, match="text_encoder_2, which this pipeline does not have"):
        load_adapter({**models, "tokenizer": pipe.tokenizer}, file, "dog")
    exchanged = {**models, "text_encoder": pipe.text_encoder_2, "text_encoder_2": pipe.text_encoder}
    with pytest.raises(UserError, match=r"shape \(24,\), the text_encoder takes \(32,\)"):
        load_adapter({**exchanged, "tokenizer": pipe.tokenizer, "tokenizer_2": pipe.tokenizer_2}, file, "dog")
    with pytest.raises(UserError, match="is a CLIPTextModel with a str, which can't take learned tokens"):
        load_adapter({**models, "text_encoder_2": pipe.text_encoder_2, "tokenizer": "", "tokenizer_2": ""}, file, "dog")
    assert loaded_adapters(pipe) == []
    assert len(pipe.tokenizer) == len(tiny_tokenizer())


def test_a_mapping_with_its_tokenizers_will_do(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors")
    pipe = tiny_pipeline()
    models = {component: getattr(pipe, component) for component in ("unet", "text_encoder", "tokenizer")}
    load_adapter(models, file, "dog")
    assert TOKEN in pipe.tokenizer.tokenize("a <robo>")
    save_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "dog", tmp_path / "b", metadata=METADATA)
    assert read_adapter(tmp_path / "b")[0].tokens == {"text_encoder": [TOKEN]}


def test_a_file_of_tokens_alone_is_refused(tmp_path: Path) -> None:
    header, tensors = read_adapter(adapter_file(tmp_path / "dog.safetensors"))
    base = dataclasses.replace(header.base, digests=digests_of_pipeline(tiny_pipeline(), []))
    only = {"text_encoder.tokens": tensors["text_encoder.tokens"]}
    write_adapter(tmp_path / "only", dataclasses.replace(header, base=base, components={}), only)
    with pytest.raises(UserError, match="adapts no layer"):
        load_adapter(tiny_pipeline(), tmp_path / "only")


def test_swapping_writes_the_rows_in_place(tmp_path: Path) -> None:
    first, second = (adapter_file(tmp_path / f"{seed}", names=LONG_TOKEN, seed=seed) for seed in (11, 21))
    pipe = tiny_pipeline()
    load_adapter(pipe, second, "dog")
    expected = hidden(pipe, "a <robo> on <robo>_1")
    unload_adapter(pipe, "dog")
    load_adapter(pipe, first, "dog")
    place = token_parameters(pipe, "dog")["text_encoder.tokens"].data_ptr()
    swap_adapter(pipe, "dog", second)
    assert torch.equal(hidden(pipe, "a <robo> on <robo>_1"), expected)
    assert token_parameters(pipe, "dog")["text_encoder.tokens"].data_ptr() == place


@pytest.mark.parametrize("names", [("<robo>",), ("<robo>", "<other>"), ()])
def test_swapping_other_tokens_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    live_adapter(pipe, "other", seed=9)
    if names:
        add_tokens(pipe, "other", learned(pipe, names))
    file = save_adapter(pipe, "other", tmp_path / "other", metadata=METADATA)
    pipe = tiny_pipeline()
    load_adapter(pipe, adapter_file(tmp_path / "dog", names=LONG_TOKEN), "dog")
    before = trace(pipe)
    with pytest.raises(UserError, match=r"its learned tokens are .*, the adapter's text_encoder: <robo>, <robo>_1"):
        swap_adapter(pipe, "dog", file)
    assert trace(pipe) == before


def test_adding_tokens_to_a_live_adapter() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="no adapter 'dog'"):
        add_tokens(pipe, "dog", learned(pipe))
    live_adapter(pipe, "dog")
    before = trace(pipe)
    for tokens, message in (
        ({"unet": {TOKEN: rows(TEXT_WIDTH, 1)}}, "tokens belong to one of"),
        ({"text_encoder": {}}, "no tokens are given"),
        ({"text_encoder": {TOKEN: rows(TEXT_WIDTH, 1)[None]}}, r"shape \(1, 24\)"),
        ({"text_encoder": {TOKEN: rows(TEXT_WIDTH, 1) / 0}}, "NaN or infinite"),
        ({"text_encoder": {"": rows(TEXT_WIDTH, 1)}}, "one word"),
    ):
        with pytest.raises(UserError, match=message):
            add_tokens(pipe, "dog", tokens)
        assert trace(pipe) == before
    add_tokens(pipe, "dog", learned(pipe))
    with pytest.raises(UserError, match="has tokens in the text_encoder already"):
        add_tokens(pipe, "dog", learned(pipe, ("<more>",)))


def test_rows_learn_and_no_row_of_the_table_in_their_place() -> None:
    pipe = tiny_pipeline()
    live_adapter(pipe, "dog")
    add_tokens(pipe, "dog", learned(pipe, LONG_TOKEN))
    (parameter,) = token_parameters(pipe, "dog").values()
    assert parameter.dtype == torch.float32 and not parameter.requires_grad
    parameter.requires_grad = True
    ids = pipe.tokenizer("a photo of <robo>_1", return_tensors="pt").input_ids
    pipe.text_encoder(ids).last_hidden_state.square().sum().backward()
    assert parameter.grad is not None
    assert parameter.grad[0].count_nonzero() == 0 and parameter.grad[1].count_nonzero() > 0
    used = pipe.text_encoder.get_input_embeddings().weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert used == sorted(set(ids[0].tolist()) - {ids.max().item()})


def test_words_that_contain_a_token_of_letters_are_read_as_before() -> None:
    pipe = tiny_pipeline()
    spelled = pipe.tokenizer.tokenize("a zwxy photo")
    live_adapter(pipe, "dog")
    add_tokens(pipe, "dog", learned(pipe, ("zwx",)))
    assert pipe.tokenizer.tokenize("a zwxy photo") == spelled
    assert pipe.tokenizer.tokenize("a zwx, photo")[1] == "zwx"


@pytest.mark.parametrize("wrong_end", [False, True])
def test_text_is_pooled_at_its_end_though_tokens_have_higher_ids(wrong_end: bool) -> None:
    pipe = sdxl_pipeline()
    if wrong_end:  # as in the configuration of SDXL
        pipe.text_encoder_2.config.eos_token_id = 2
        for module in pipe.text_encoder_2.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = 2
    before = trace(pipe)
    plain = encoded(pipe, PLAIN, "text_encoder_2").text_embeds
    live_adapter(pipe, "dog")
    add_tokens(pipe, "dog", learned(pipe))
    assert torch.equal(encoded(pipe, PLAIN, "text_encoder_2").text_embeds, plain)
    pooled = [encoded(pipe, f"a <robo> on the {end}", "text_encoder_2").text_embeds for end in ("beach", "dog")]
    assert not torch.equal(*pooled)
    unload_adapter(pipe, "dog")
    assert trace(pipe) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_beside_a_textual_inversion_of_diffusers(earlier: bool, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors")
    theirs = rows(TEXT_WIDTH, 77)[None]
    alone = tiny_pipeline()
    alone.load_textual_inversion(theirs, token="<their>")
    expected = hidden(alone, "a photo of <their>")
    alone = tiny_pipeline()
    load_adapter(alone, file, "dog")
    ours = hidden(alone, "a photo of <robo>")

    pipe = tiny_pipeline()
    if earlier:
        pipe.load_textual_inversion(theirs, token="<their>")
    load_adapter(pipe, file, "dog")
    if not earlier:
        pipe.load_textual_inversion(theirs, token="<their>")
        with pytest.raises(UserError, match="while <their> is in the tokenizer"):
            unload_adapter(pipe, "dog")
        with pytest.raises(UserError, match="while <their> is in the tokenizer"):
            remove(pipe.text_encoder, "dog")
        assert loaded_adapters(pipe) == ["dog"]
    assert torch.equal(hidden(pipe, "a photo of <their>"), expected)
    assert torch.equal(hidden(pipe, "a photo of <robo>"), ours)
    if not earlier:
        pipe.unload_textual_inversion("<their>")
    unload_adapter(pipe, "dog")
    assert loaded_adapters(pipe) == []
    assert pipe.tokenizer.tokenize("a <robo>") == tiny_tokenizer().tokenize("a <robo>")
    if earlier:
        assert torch.equal(hidden(pipe, "a photo of <their>"), expected)


def test_an_id_that_was_a_learned_token_is_free_for_others(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    for seed, name in enumerate(("one", "two")):
        load_adapter(pipe, adapter_file(tmp_path / name, names=(f"<{name}>",), seed=seed), name)
    unload_adapter(pipe, "one")
    theirs = rows(TEXT_WIDTH, 77)
    pipe.load_textual_inversion(theirs[None], token="<their>")  # has an id that was a learned token's
    ids = pipe.tokenizer("<their>", return_tensors="pt").input_ids
    position = pipe.text_encoder.embeddings.position_embedding.weight[1]
    assert torch.equal(pipe.text_encoder.embeddings(input_ids=ids)[0, 1], theirs + position)


def test_tokens_outlive_neither_a_merge_nor_diffusers_own_removal(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors")
    pipe = tiny_pipeline()
    before = trace(pipe)
    load_adapter(pipe, file, "dog")
    pipe.unload_textual_inversion()  # of all tokens, whosever
    unload_adapter(pipe, "dog")
    assert trace(pipe) == before
    load_adapter(pipe, file, "dog")
    merge_adapters(pipe, {})
    assert trace(pipe) == before


def test_a_t5_keeps_rows_that_its_tokenizer_does_not_use(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer) + 20
    config = T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0)
    torch.manual_seed(0)
    encoder = T5EncoderModel(config).eval()
    models = {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    add_training_adapter({"text_encoder_3": encoder}, SVDiffConfig(targets="all"), "dog")
    ids = tokenizer("a photo of dog", return_tensors="pt").input_ids
    plain = encoder(ids).last_hidden_state
    add_tokens(models, "dog", {"text_encoder_3": {TOKEN: rows(16, 1)}})
    assert torch.equal(encoder(ids).last_hidden_state, plain)
    with_token = tokenizer("a photo of <robo>", return_tensors="pt").input_ids
    assert with_token.max() < size  # one of the rows that the table has beyond the tokenizer
    embedded = encoder.encoder.embed_tokens(with_token).detach()
    embedded[with_token == with_token.max()] = rows(16, 1)
    assert torch.equal(encoder(with_token).last_hidden_state, encoder(inputs_embeds=embedded).last_hidden_state)
    file = save_adapter(models, "dog", tmp_path / "t5.safetensors", metadata=METADATA)
    assert read_adapter(file)[0].tokens == {"text_encoder_3": [TOKEN]}
    unload_adapter(models, "dog")
    assert encoder.encoder.embed_tokens.weight.shape == (size, 16)


def test_a_copy_of_a_text_encoder_knows_the_tokens_too() -> None:
    pipe = tiny_pipeline()
    live_adapter(pipe, "dog")
    add_tokens(pipe, "dog", learned(pipe))
    ids = pipe.tokenizer("a photo of <robo>", return_tensors="pt").input_ids
    expected = pipe.text_encoder(ids).last_hidden_state
    copied = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        token_parameters(pipe, "dog")["text_encoder.tokens"].zero_()
    assert not torch.equal(pipe.text_encoder(ids).last_hidden_state, expected)
    assert torch.equal(copied(ids).last_hidden_state, expected)


def test_state_of_an_adapter_holds_its_tokens_and_goes_back_into_it(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "dog.safetensors")
    pipe, other = tiny_pipeline(), tiny_pipeline()
    load_adapter(pipe, file, "dog")
    live_adapter(other, "dog", seed=3)
    state = adapter_state(pipe, "dog")
    assert state.keys() == {*read_adapter(file)[1]} - {"sketch"}
    with pytest.raises(UserError, match=r"the state alone has text_encoder\.tokens"):
        load_adapter_state(other, "dog", state)
    add_tokens(other, "dog", learned(other, (TOKEN,), seed=9))
    before = adapter_state(other, "dog")
    rows_of_state = state["text_encoder.tokens"]
    with pytest.raises(UserError, match=r"the adapter alone has text_encoder\.tokens"):
        load_adapter_state(other, "dog", {key: state[key] for key in state if key != "text_encoder.tokens"})
    with pytest.raises(UserError, match=r"text_encoder\.tokens is of another shape"):
        load_adapter_state(other, "dog", {**state, "text_encoder.tokens": rows_of_state.repeat(2, 1)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_state(other, "dog").items())
    load_adapter_state(other, "dog", state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(other, "dog").items())
    assert torch.equal(hidden(other, f"a photo of {TOKEN}"), hidden(pipe, f"a photo of {TOKEN}"))
