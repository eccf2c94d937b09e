"""Export a model for others, with a model card: a Bert in the Hugging Face layout, a FinDNA as safetensors.

    python -m tools.export my-dna-bert --init out/randommask/last.pt
    python -m tools.export tata --init out/finetune/csv_my/randommask.pt --license mit --hub_id me/tata
    hf upload me/tata tata                                   publishes it (package huggingface_hub)

Needs safetensors.
"""
import argparse
import json
import math
import os
import re

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name

import data
import finetune
import models

CARD = """---
{facts}
---
# {title}

{what} Made with nanoDNA's `{method}`.

- steps: {step}; fingerprint of the data (genome, or splits): `{data}`
- tokens: {tokens}
- numbers: {numbers}

## Use

```python
{use}
```

## Limits

The model has seen only a reference sequence and, if fine-tuned, one labelled data set: results on other
populations, species and assays may differ. Not for clinical use. Benchmarks drawn from the pretraining genome
are not independent of it.

## How it was made

```json
{args}
```

Cite {cite}, and nanoDNA.
"""
USE_BERT = """from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
dna = "ACGTTGCAACGTTGCA"                                   # the tokenizer makes the {k}-mers
print(model(**tokenizer({given}, return_tensors="pt")).logits.shape)"""
USE_MIXER = """import json, torch                                    # with nanoDNA's data.py and models.py
from safetensors.torch import load_file
import data, models
spec = json.load(open("FOLDER/config.json"))
net = models.make_backbone(spec["mixer"]).eval()
blocks = {"n_blocks": spec["n_blocks"]} if spec.get("n_blocks") else {}
weights = load_file("FOLDER/model.safetensors")
net.load_state_dict({name[9:]: w for name, w in weights.items() if name.startswith("backbone.")})
bases = torch.from_numpy(data.encode("ACGTTGCAACGTTGCA"))[None]
print(net(data.one_hot(bases), **blocks).shape)            # (1, bases, channels)"""
CITE = {"randommask": "Liang et al., Rethinking the BERT-like Pretraining for DNA Sequences",
        "cm_gems": "Roy et al., GeneMask and CM-GEMS", "findna": "Yu et al., Self-Distillation Improves DNA "
        "Sequence Inference", "finetune": "the paper of the pretrained model and of the data set"}


def recorded(init, state):
    """Reads a fine-tuned checkpoint's scores in results.jsonl, else the last losses in the log beside it."""
    if init.startswith(("hf:", "findna:")):                  # no run of ours is beside it
        return []
    rows = finetune.read_rows(os.path.dirname(os.path.dirname(init)))
    numbers = [row["test"] | {"task": row["task"], "seed": row["seed"]} for row in rows
               if row["id"] == state.get("id")]
    path, most = os.path.join(os.path.dirname(init), "log.jsonl"), state.get("step", math.inf)
    if numbers or not os.path.exists(path):
        return numbers
    with open(path, errors="replace") as f:                  # a kill may have left broken lines
        log = [json.loads(line) for line in f if 0 < (training.step_of(line) or 0) <= most]
    return {name: value for name, value in log[-1].items()
            if "val" in name or name in ("step", "loss")} if log else []


def without_paths(value):
    """Returns the flags of a run without this machine's folders: /home/me/hg38.fa becomes hg38.fa."""
    if isinstance(value, dict):
        return {name: without_paths(x) for name, x in value.items()}
    if isinstance(value, list):
        return [without_paths(x) for x in value]
    if isinstance(value, str):                               # also of hf:/home/me/folder, random:hf:/...
        kind, path = re.fullmatch("((?:hf:|findna:|random:)*)(.*)", value, re.DOTALL).groups()
        return kind + os.path.basename(path.rstrip("/")) if path.startswith(("/", "~")) else value
    return value


def card_facts(spec, library, hub):
    """Returns the lines of the card that a model hub reads."""
    kind = "text-classification" if "classes" in spec else "fill-mask"
    facts = {"license": hub.get("license"), "base_model": hub.get("base_model"), "library_name": library,
             "pipeline_tag": kind if library == "transformers" else "", "tags": "[biology, genomics, dna]"}
    return "\n".join(f"{name}: {value}" for name, value in facts.items() if value)


def model_card(state, spec, folder, hub, use):
    """Makes README.md of an export. state: the checkpoint, with scores or losses; use: of use_bert, ..."""
    library, tokens, snippet = use
    folder, numbers = without_paths(folder), state["numbers"]
    return CARD.format(
        facts=card_facts(spec, library, hub), title=os.path.basename(folder.rstrip("/")), tokens=tokens,
        what=f"A model of {', '.join(spec['classes'])}." if "classes" in spec else "A pretrained DNA model.",
        method=state["method"], step=state["step"], data=state["data"],
        numbers=json.dumps(without_paths(numbers)) if numbers else "none recorded",
        use=snippet.replace("FOLDER", library == "transformers" and hub.get("hub_id") or folder),
        args=json.dumps(without_paths(state["args"]), indent=1),
        cite=CITE.get(state["method"], "the model's own paper"))


def use_bert(spec):
    """Returns (library, tokens, Python snippet) for the card."""
    auto = "AutoModelForSequenceClassification" if "classes" in spec else "AutoModelForMaskedLM"
    tokens = f"{spec['k']}-mers, stride {spec['stride']}"
    if spec.get("strands") == "average":
        tokens += "; scored by the mean output for a sequence and its reverse complement (both strands)"
    if "classes" in spec and "bert" in spec and spec["long"] == "chunk":
        tokens += (f"; nanoDNA averages windows of sequences of more than {spec['bert']['block_size']} "
                   f"tokens, transformers cannot read these")
    given = "dna, dna" if spec.get("pairs") else "dna"       # a pair: two sequences
    return "transformers", tokens, USE_BERT.format(auto=auto, k=spec["k"], given=given)


def write_bert(net, folder, card):
    if "classes" in net.spec:
        problem = "regression" if net.spec["regression"] else \
            f"{'multi' if net.spec['multilabel'] else 'single'}_label_classification"
        models.save_hf(net, folder, net.spec["classes"], problem, card, net.spec["stride"])
    elif not net.bert.head.weight.any():
        raise ValueError("this BERT has no masked-LM head, which an export needs; fine-tune it first")
    else:
        models.save_hf(net.bert, folder, card=card, stride=net.spec["stride"])


def write_mixer(net, folder, card):
    """Writes weights, spec and card; leaves out the untrained head of a pretrained network."""
    weights = {name: tensor for name, tensor in net.state_dict().items()
               if "classes" in net.spec or name.startswith("backbone.")}
    models.save_folder(folder, weights, {"config.json": net.spec, "README.md": card})


EXPORTS = {"bert": (use_bert, write_bert), "mixer": (       # by kind of network
    lambda spec: ("safetensors", "single bases, one-hot A, C, G, T, N", USE_MIXER), write_mixer)}


def export(folder, init, eval_network=None, **hub):
    """Writes a folder with the weights of --init and a model card. hub: license, base_model, hub_id."""
    net = finetune.load_model(init, eval_network=eval_network).net
    if net.spec["kind"] not in EXPORTS:
        raise ValueError(f"--init {init}: a {net.spec['kind']} is not exported; use a Bert or a ChordMixer")
    use, write = EXPORTS[net.spec["kind"]]
    state = {"method": "hf", "step": "unknown", "data": "unknown", "args": {"init": init}}
    if not init.startswith(("hf:", "findna:")):
        state = training.load(init)
    card = model_card(state | {"numbers": recorded(init, state)}, net.spec, folder, hub, use(net.spec))
    with data.new_path(folder, folder=True) as new:
        write(net, new, card)
    print(f"{init} -> {folder}" + ("" if hub.get("license") else "; its card states no licence (--license)"))


def matching(pattern, example):
    """Returns an argparse type: text that matches the pattern; example: for the error message."""
    def check(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"expected {example}, got {data.quoted(text)}")
        return text
    return check


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    parser.add_argument("folder", type=file_name, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--init", type=file_name, required=True, help="checkpoint, hf:FOLDER or findna:FILE")
    parser.add_argument("--eval_network", choices=("teacher", "student"),
                        help="FinDNA: network to export (as finetune.py)")
    parser.add_argument("--license", type=matching(r"[a-z0-9.+-]+", "one such as mit or apache-2.0"),
                        metavar="ID", help="for the card")
    for name, what in ("--base_model", "what it was trained from"), ("--hub_id", "where it will be uploaded"):
        parser.add_argument(name, type=matching(r"[\w.-]+/[\w.-]+", "USER/NAME"), metavar="USER/NAME",
                            help=f"for the card: {what}")
    with training.user_errors():
        export(**vars(parser.parse_args()))
