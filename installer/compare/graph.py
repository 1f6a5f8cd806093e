"""A workflow in API form, with ToMe, EasyCache, another seed, prompt, size or number of steps put in.

The standard library alone. What cannot be placed is a SetupError of one line.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from .. import workflow as nodes
from ..console import SetupError, failed
from ..workflow import Workflow
from .plan import CACHE, Variant

MODEL_NODE, TAKE_NODE, TAKE = "ToMeCompareModel", "ToMeCompareTake", "tome-compare-take"
TOME, CACHES = "ToMe", ("EasyCache", "LazyCache")
# A node that takes a MODEL and gives nothing but these changes the model; any other one uses it.
PARTS = {"MODEL", "CLIP", "VAE", "CLIP_VISION", "CONTROL_NET", "TOME_RECORD"}
PARTS |= {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}  # a LoRA's trigger words and the like
TEXTS = ("text", "prompt", "text_g", "text_l", "clip_l", "t5xxl")
TO_PROMPT = ("positive", "conditioning", "guider", "cond1", "conditioning_1")
FORM_HINT = "In ComfyUI's page: Workflow > Export (API)."


def load(path: Path) -> Workflow:
    """The file's workflow. Raises SetupError where it is none in API form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise failed(f"{path} could not be read", error) from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path} is no JSON: {error}", FORM_HINT) from error
    if isinstance(found, dict) and "nodes" in found and "links" in found:
        raise SetupError(f"{path} is in the page's own form, not in API form", FORM_HINT)
    if not isinstance(found, dict) or not found:
        raise SetupError(f"{path} is no workflow in API form", FORM_HINT)
    for id, node in found.items():
        for name, kind in (("class_type", str), ("inputs", dict)):
            if not (isinstance(node, dict) and isinstance(node.get(name), kind)):
                raise SetupError(f"{path} is no workflow in API form: node {id} has no {name}", FORM_HINT)
    return found


def is_link(value: Any) -> bool:
    """Whether an input's value is another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


class Graph:
    """A workflow and what the server knows of its nodes (`/object_info`).

    Raises SetupError where the server lacks a node, or where no model is on its way to a picture.
    """

    def __init__(self, workflow: Workflow, known: Mapping[str, Any]) -> None:
        self.workflow, self.known = copy.deepcopy(workflow), known
        for id, node in self.workflow.items():
            if node["class_type"] not in known:
                raise SetupError(
                    f"ComfyUI has no node {node['class_type']}, which the workflow names (node {id})",
                    "Name the ComfyUI that has it: --comfyui DIR",
                )
            for name, value in node["inputs"].items():
                if is_link(value) and value[0] not in self.workflow:
                    raise SetupError(f"node {id} of the workflow takes {name} from node {value[0]}, which is not there")
        self.image = self._find_image()
        self._keep(self.image[0])
        self.own_cache = any(node["class_type"] in CACHES for node in self.workflow.values())
        self.uses = list(self._uses())  # (node, input) of every model that is sampled with
        if not self.uses:
            raise SetupError("the workflow has no node that takes a MODEL on the way to its picture")
        found = {use: self._tome_before(*use) for use in self.uses}
        # Where ToMe and EasyCache are put, with the values of the ToMe node that stands there.
        with_tome = {use: values for use, values in found.items() if values}
        self.places: dict[tuple[str, str], dict[str, Any]] = with_tome or dict.fromkeys(found, {})
        self._bypass_tome()

    # -- what is there

    def links(self, id: str) -> Iterator[tuple[str, list[Any], str]]:
        """(input, link, type of that output) of a node's links."""
        for name, value in self.workflow[id]["inputs"].items():
            if is_link(value):
                outputs = self.known[self.workflow[value[0]]["class_type"]]["output"]
                yield name, value, str(outputs[value[1]]) if value[1] < len(outputs) else ""

    def wants(self, id: str, name: str) -> str:
        """The type that a node's input is declared with."""
        kind = nodes.inputs_of(self.known[self.workflow[id]["class_type"]]).get(name, [""])[0]
        return kind if isinstance(kind, str) else "COMBO"

    def before(self, id: str) -> dict[str, int]:
        """A node and all that it depends on, with the longest way to each. Raises SetupError where links go round."""
        found: dict[str, int] = {}

        def walk(id: str, way: tuple[str, ...]) -> None:
            if id in way:
                raise SetupError(f"the workflow's links form a circle at node {id}")
            if found.get(id, -1) < len(way):
                found[id] = len(way)
                for _, link, _ in self.links(id):
                    walk(link[0], (*way, id))

        walk(id, ())
        return found

    def _find_image(self) -> list[Any]:
        """The link whose pictures are compared: of the last node that saves, or else shows."""
        kinds = {id: node["class_type"] for id, node in self.workflow.items()}
        links = {id: self._image_of(id) for id, kind in kinds.items() if self.known[kind].get("output_node")}
        found = [("Save" in kinds[id], max(self.before(link[0]).values()), link) for id, link in links.items() if link]
        if not found:
            raise SetupError("the workflow saves and shows no picture", "Add a SaveImage node and export it again.")
        return max(found, key=lambda one: one[:2])[2]

    def _image_of(self, id: str) -> list[Any] | None:
        links = list(self.links(id))
        direct = next((link for _, link, kind in links if kind == "IMAGE"), None)
        if direct is not None:
            return direct
        return next((self._image_of(link[0]) for _, link, kind in links if kind == "VIDEO"), None)

    def _keep(self, last: str) -> None:
        """Leave out all that the picture does not depend on: saving and other outputs would take time."""
        kept = self.before(last)
        self.workflow = {id: node for id, node in self.workflow.items() if id in kept}

    def _uses(self) -> Iterator[tuple[str, str]]:
        """Not a node whose model comes through another use: what is put before that one is on it."""
        takers = {
            id: [name for name, _, _ in self.links(id) if self.wants(id, name) == "MODEL"] for id in self.workflow
        }
        users = {id for id, names in takers.items() if names and self._gives_more(id)}
        for id in self.workflow:
            for name in takers[id] if id in users else ():
                if users.isdisjoint(self._way(id, name)):
                    yield id, name

    def _gives_more(self, id: str) -> bool:
        """Whether a node gives more than the parts of a model."""
        outputs = self.known[self.workflow[id]["class_type"]]["output"]
        return any(isinstance(kind, str) and kind not in PARTS for kind in outputs)  # a list: choices

    def _way(self, id: str, name: str) -> Iterator[str]:
        """The nodes on a model's way to this input, from it upwards."""
        link: list[Any] | None = self.workflow[id]["inputs"][name]
        while link is not None:
            id = link[0]
            yield id
            link = next((link for name, link, _ in self.links(id) if self.wants(id, name) == "MODEL"), None)

    def _tome_before(self, id: str, name: str) -> dict[str, Any]:
        """The inputs of the ToMe node on a model's way to this input; its model is another one then."""
        nodes = (self.workflow[one] for one in self._way(id, name))
        return next((dict(node["inputs"]) for node in nodes if node["class_type"] == TOME), {})

    def _bypass_tome(self) -> None:
        models = {id: node["inputs"].get("model") for id, node in self.workflow.items() if node["class_type"] == TOME}
        for id, model in models.items():
            if not is_link(model):
                raise SetupError(f"the ToMe node {id} of the workflow has no model")
            del self.workflow[id]
        for node in self.workflow.values():
            for name, value in node["inputs"].items():
                while is_link(value) and value[0] in models:
                    value = node["inputs"][name] = models[value[0]]

    def timed(self) -> set[str]:
        """The nodes that sample, and all behind them: the generation. What comes before is the same in all variants."""
        found = {id for id, _ in self.uses}
        while True:
            more = {id for id in self.workflow if any(link[0] in found for _, link, _ in self.links(id))} - found
            if not more:
                return found
            found |= more

    def steps(self) -> int | None:
        """The largest number of steps that a node is set to."""
        found = [node["inputs"]["steps"] for node in self.workflow.values() if _is_number(node["inputs"].get("steps"))]
        return max(found, default=None)

    def loaded(self) -> list[str]:
        """Names of the files that the models come from, without folders."""
        names = ("ckpt_name", "unet_name", "model_name", "gguf_name")
        inputs = (one for node in self.workflow.values() for one in node["inputs"].items())
        found = [value for name, value in inputs if name in names and isinstance(value, str)]
        return [PureWindowsPath(value).name for value in found]  # it takes both kinds of slashes

    # -- what is put in

    def set_checkpoint(self, name: str) -> None:
        """Load this checkpoint in place of the workflow's. Raises SetupError where it loads none."""
        loaders = [node["inputs"] for node in self.workflow.values() if "ckpt_name" in node["inputs"]]
        if not loaders:
            raise SetupError("the workflow loads no checkpoint, so --checkpoint has no place in it")
        for inputs in loaders:
            inputs["ckpt_name"] = name

    def set_seed(self, seed: int) -> None:
        """Give every node that draws noise this seed. Raises SetupError where none has a seed."""
        found = False
        for node in self.workflow.values():
            for name in ("seed", "noise_seed"):
                if name in node["inputs"] and not node["class_type"].startswith(TOME):
                    node["inputs"][name], found = seed, True
        if not found:
            raise SetupError("no node of the workflow has a seed, so several pictures cannot be made")

    def set_prompt(self, text: str) -> None:
        """Write the prompt where the samplers take it from. Raises SetupError where no text is found there."""
        todo, seen, found = [id for id, _ in self.uses], set(), False
        while todo:
            id = todo.pop()
            if id in seen:
                continue
            seen.add(id)
            inputs = self.workflow[id]["inputs"]
            texts = [name for name in TEXTS if name in inputs and self.wants(id, name) == "STRING"]
            for name in texts:
                inputs[name], found = text, True
            if not texts:
                todo += [inputs[name][0] for name in TO_PROMPT if is_link(inputs.get(name))]
        if not found:
            raise SetupError("the workflow's prompt was not found, so --prompts has no place in it")

    def set_size(self, size: str) -> None:
        """Set width and height where a latent is made from nothing. Raises SetupError where none is."""
        width, height = map(int, size.split("x"))
        found = False
        for id, node in self.workflow.items():
            inputs = node["inputs"]
            if "LATENT" in self.known[node["class_type"]]["output"] and {"width", "height"} <= inputs.keys():
                if not any(kind == "LATENT" for _, _, kind in self.links(id)):
                    inputs["width"], inputs["height"], found = width, height, True
        if not found:
            raise SetupError("no node of the workflow makes a latent of a width and a height: leave --sizes out")

    def with_variant(self, variant: Variant, nonce: int) -> Workflow:
        """The workflow of a variant, which ends in a node that hands the pictures out.

        nonce: another number samples anew; ComfyUI would answer what it has sampled from its cache.
        """
        made = copy.deepcopy(self.workflow)
        added: dict[str, list[Any]] = {}

        def put(kind: str, inputs: dict[str, Any]) -> list[Any]:
            key = json.dumps([kind, inputs], sort_keys=True)
            if key not in added:  # samplers that share a model share what is put behind it
                id = f"tome-compare-{len(added)}"
                made[id] = {"class_type": kind, "inputs": inputs}
                added[key] = [id, 0]
            return added[key]

        for id, name in self.uses:
            model = made[id]["inputs"][name]
            if (id, name) in self.places and variant.tome is not None:
                values = nodes.defaults(self.known[TOME]) | self.places[id, name] | variant.tome
                model = put(TOME, {**values, "model": model})
            if (id, name) in self.places and variant.cache:
                model = put(CACHE, {**nodes.defaults(self.known[CACHE]), "model": model})
            model = put(MODEL_NODE, {"model": model, "nonce": nonce, "split": variant.split})
            made[id]["inputs"][name] = model
        if variant.share < 1:
            _fewer_steps(made, variant.share)
        made[TAKE] = {"class_type": TAKE_NODE, "inputs": {"images": self.image, "model": model}}
        return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fewer_steps(workflow: Workflow, share: float) -> None:
    """This share of the steps, of whole samplings and of parts of one."""
    for node in workflow.values():
        inputs = node["inputs"]
        if not _is_number(inputs.get("steps")):
            continue
        most = inputs["steps"]
        inputs["steps"] = max(1, round(share * most))
        for name in ("start_at_step", "end_at_step"):
            if _is_number(inputs.get(name)) and inputs[name] <= most:
                inputs[name] = round(share * inputs[name])
