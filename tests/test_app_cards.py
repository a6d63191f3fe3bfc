"""The adapter cards: what the server makes of them, whatever a visitor sends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_files import ModelsOnDisk, write_models

pytest.importorskip("gradio")

from svft_diffusion.app.components.adapter_cards import (
    Card,
    adapter_cards,
    chosen_adapters,
    with_card,
    with_warnings,
)
from svft_diffusion.app.shelf.library import Library, LibraryEntry
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.block_presets import block_weights, preset_of, usable_presets


@dataclasses.dataclass(frozen=True)
class Offer:
    """A library with three adapters, one of another base."""

    models: ModelsOnDisk
    library: Library

    @property
    def base(self) -> str:
        return str(self.models.base)

    def entry(self, name: str, **header: Any) -> LibraryEntry:
        entry = self.library.by_name(name)
        return dataclasses.replace(entry, header=dataclasses.replace(entry.header, **header))

    def chosen(self, *cards: Card) -> list[tuple[str, Any]]:
        """Names and weights of the adapters that act, as they come from the page: through JSON."""
        value = json.loads(json.dumps(list(cards)))
        return [(adapter.name, weight) for adapter, weight in chosen_adapters(value, self.library, self.base, "error")]


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    folder = tmp_path_factory.mktemp("offer")
    models = write_models(folder)
    shutil.copy(models.foreign, folder / "adapters")
    return Offer(models, Library(folder / "adapters", folder / "adapters" / "uploads"))


def test_a_card_shows_what_the_file_says(offer: Offer) -> None:
    entry = offer.entry(
        "dog", title="My <dog>", suggested_strength=0.75, strength_range=(-3.0, 1.0), thumbnail=b"\xff\xd8picture"
    )
    (card,) = with_card([], entry)
    assert (card["id"], card["name"], card["title"], card["trigger"]) == (entry.id, "dog", "My <dog>", "sks")
    assert (card["weight"], card["lowest"], card["highest"]) == (0.75, -3.0, 2.0)
    assert (card["on"], card["components"], card["blocks"], card["warning"]) == (True, None, "all", "")
    assert card["thumbnail"] == "data:image/jpeg;base64,/9hwaWN0dXJl"
    assert card["parts"] == [["unet", "UNet"], ["text_encoder", "Text encoder"]]
    assert [name for name, _ in card["presets"]] == ["all", "first", "middle", "last", "first_middle", "middle_last"]
    assert with_card(None, entry, 1.25)[0]["weight"] == 1.25
    assert with_card("", offer.entry("dog", suggested_strength=40.0))[0]["weight"] == 10.0
    assert str(offer.models.dog.parent) not in json.dumps(card)
    assert adapter_cards([card], render=False).value == [card]


def test_cards_are_added_once(offer: Offer) -> None:
    dog, style = offer.entry("dog"), offer.entry("style")
    one = with_card([], dog)
    both = with_card(one, style)
    assert both[:1] == one and len(one) == 1
    with pytest.raises(UserError, match="style is there already"):
        with_card(both, style)
    with pytest.raises(UserError, match="between -10 and 10"):
        with_card([], dog, 10.5)


def test_weights_are_those_of_the_cards(offer: Offer) -> None:
    (dog,) = with_card([], offer.entry("dog"))
    (style,) = with_card([], offer.entry("style"))
    assert offer.chosen() == []
    assert offer.chosen(dog | {"weight": -0.5}, style | {"weight": 10}) == [("dog", -0.5), ("style", 10.0)]
    assert offer.chosen(dog | {"on": False}, style | {"weight": 0}) == [("style", 0.0)]
    halves = dog | {"weight": 0.8, "components": {"unet": 0.7, "text_encoder": 0}}
    assert offer.chosen(halves) == [("dog", {"unet": 0.56, "text_encoder": 0.0})]
    assert offer.chosen(halves | {"components": {"unet": 0.5}}) == [("dog", {"unet": 0.4, "text_encoder": 0.8})]
    late = dog | {"weight": 0.5, "blocks": "last"}
    assert offer.chosen(late) == [("dog", {"unet": {"up_blocks": 0.5}, "text_encoder": 0.5})]


def test_a_weight_comes_back_as_the_card_that_gave_it(offer: Offer) -> None:
    entry = offer.entry("dog")
    (dog,) = with_card([], entry)
    for fields in (
        {"weight": 0.3},
        {"weight": 0.8, "components": {"unet": 0.7, "text_encoder": 0}},
        {"weight": -0.4, "blocks": "first_middle"},
        {"weight": 0.5, "components": {"text_encoder": 3.0}, "blocks": "last"},
    ):
        ((_, weight),) = offer.chosen(dog | fields)
        assert offer.chosen(*with_card([], entry, weight)) == [("dog", weight)]
    with pytest.raises(UserError, match="weights of single blocks"):
        with_card([], entry, {"unet": {"up_blocks": 0.5, "down_blocks": 0.2}})
    with pytest.raises(UserError, match="nothing in the transformer"):
        with_card([], entry, {"transformer": 1.0})


def test_what_a_visitor_sends_is_checked(offer: Offer) -> None:
    (dog,) = with_card([], offer.entry("dog"))
    hostile: list[tuple[object, str]] = [
        ("cards", "damaged"),
        ([dog, "dog"], "damaged"),
        ({"id": dog["id"]}, "damaged"),
        ([dog | {"weight": 10.01}], "weight of dog must be between -10 and 10"),
        ([dog | {"weight": float("nan")}], "between"),
        ([dog | {"weight": float("inf")}], "between"),
        ([dog | {"weight": 10**400}], "between"),
        ([dog | {"weight": True}], "must be a number"),
        ([dog | {"weight": "1"}], "must be a number"),
        ([dog | {"weight": None}], "must be a number"),
        ([dog | {"components": ["unet"]}], "card of dog is damaged"),
        ([dog | {"components": {"vae": 1.0}}], "card of dog is damaged"),
        ([dog | {"components": {"unet": "x"}}], "must be a number"),
        ([dog | {"weight": 9, "components": {"unet": 2}}], "between"),
        ([dog | {"blocks": "sideways"}], "no blocks called 'sideways'"),
        ([dog | {"blocks": ["all"]}], "card of dog is damaged"),
        ([dog | {"id": "../../etc/passwd"}], "dog is no longer in the library"),
        ([dog | {"id": None}], "no longer in the library"),
        ([dog | {"id": "0" * 16, "name": "x" * 1000}], "^x{80} is no longer in the library"),
    ]
    for value, reason in hostile:
        with pytest.raises(UserError, match=reason) as caught:
            chosen_adapters(value, offer.library, offer.base, "error")
        assert "\n" not in str(caught.value)


def test_adapters_of_another_base_are_named_and_refused(offer: Offer, tmp_path: Path) -> None:
    (dog,) = with_card([], offer.entry("dog"))
    (foreign,) = with_card([], offer.entry("foreign"))
    with pytest.raises(UserError, match="was trained on"):
        offer.chosen(dog, foreign)
    assert offer.chosen(dog, foreign | {"on": False}) == [("dog", 1.0)]
    assert len(chosen_adapters([foreign], offer.library, offer.base, "force")) == 1
    told = with_warnings([dog, foreign], offer.library, offer.base, "error")
    assert told[0] == dog and "was trained on" in told[1]["warning"]
    assert told[1] | {"warning": ""} == foreign
    other = with_warnings(told, offer.library, str(offer.models.other_base), "error")
    assert "was trained on" in other[0]["warning"] and other[1]["warning"] == ""
    nothing = Library(tmp_path, tmp_path / "uploads")
    assert "dog is no longer in the library" in with_warnings([dog], nothing, offer.base, "error")[0]["warning"]


UNET = [
    "unet.conv_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.10.resnets.0.conv1",
    "unet.mid_block.attentions.0.proj_in",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
]
FLUX = [f"transformer.transformer_blocks.{number}.attn.to_q" for number in range(11)]
FLUX += [f"transformer.single_transformer_blocks.{number}.proj_mlp" for number in range(4)]


def test_presets_of_a_unet_and_of_a_transformer() -> None:
    assert block_weights({"unet": 0.5, "text_encoder": 2.0}, "all", UNET) == {"unet": 0.5, "text_encoder": 2.0}
    assert block_weights({"unet": 0.5, "text_encoder": 2.0}, "middle_last", UNET) == {
        "unet": {"mid_block": 0.5, "up_blocks": 0.5},
        "text_encoder": 2.0,
    }
    thirds = [
        block_weights({"transformer": 1.0}, preset, FLUX)["transformer"] for preset in ("first", "middle", "last")
    ]
    assert [sorted(third) for third in thirds] == [  # type: ignore[arg-type]
        sorted(f"transformer_blocks.{number}" for number in numbers) for numbers in (range(5), range(5, 10))
    ] + [[*(f"single_transformer_blocks.{number}" for number in range(4)), "transformer_blocks.10"]]
    assert usable_presets(UNET[4:]) == ["all", "last"]
    assert usable_presets(["text_encoder.encoder.layers.0.q"]) == ["all"]
    with pytest.raises(UserError, match="no layer in the blocks 'first'"):
        block_weights({"unet": 1.0}, "first", UNET[4:])
    assert preset_of({"down_blocks": 0.5, "mid_block": 0.5}, UNET) == ("first_middle", 0.5)
    assert preset_of({"down_blocks": 0.5, "mid_block": 0.4}, UNET) is None
    assert preset_of({}, UNET) is None
