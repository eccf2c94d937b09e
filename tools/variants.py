"""Score the variants of a VCF: what each does to the outputs of a model. Writes a TSV or VCF.

    python -m tools.variants calls.vcf.gz --fasta genome.fa --init out/randommask/last.pt
    python -m tools.variants calls.vcf --fasta genome.fa --init out/findna/last.pt --out scored.vcf.gz
    python -m tools.variants calls.vcf --fasta genome.fa --init out/finetune/csv_my/randommask.pt

Pretrained: log P(ALT) - log P(REF) of masked k-mers or bases. Fine-tuned: the change of each class's
log P, or of each predicted value. --embedding: distances of embeddings. Formulas: docs/variants.md.
"""
import collections
import functools
import itertools
import os
import re
import struct
import zlib
from collections import namedtuple

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, number

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

import data
import finetune
import models
from tools.predict import add_model_flags, excel_safe, open_model, output, say_counts

COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
INFO = "nanoDNA"                                             # how the names of our INFO fields begin
LONGEST = 20                                                 # bases of an allele that are masked together
BLOCK = 4096                                                 # records at a time
DNA, LETTERS = re.compile("[ACGT]+", re.I), f"[ACGTN{''.join(data.DRAWN)}]+"   # LETTERS: IUPAC codes, too
UNSCORED = {"no ALT": r"\.", "ALT is *": r"\*", "symbolic ALT": r"<[^<>\s]+>", "ambiguous base": LETTERS,
            "breakend": rf"\.{LETTERS}|{LETTERS}\.|[^<>]*[\[\]].*"}            # an ALT like this

# An allele without the bases that it shares with the other one; it replaces start..end (0-based) of a contig
# of the FASTA. pad: bases on either side that are masked with it, 1 for an indel.
Allele = namedtuple("Allele", "contig start end pad length bases")


def read_lines(path):
    """Yields (number, text) of the lines of a plain or gzip file, without line ends and byte-order mark."""
    with data.opened(path) as f:
        for n, line in enumerate(f, 1):
            line = line if n > 1 else line.removeprefix(b"\xef\xbb\xbf")
            yield n, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def read_header(path):
    """Returns the header lines of a VCF; the last one names the columns. ValueError if there is none."""
    header = []
    for n, line in read_lines(path):
        if n == 1 and not line.startswith("##fileformat=VCF"):
            raise ValueError(f"{path}: line 1: {data.quoted(line[:40])} is not ##fileformat=VCFv4.x; use a "
                             f"VCF (bcftools view makes one of a BCF)")
        header.append(line)
        if not line.startswith("##"):
            break
    if not header or not re.match(rf"{COLUMNS}(\tFORMAT\t|$)", header[-1]):
        raise ValueError(f"{path}: line {max(len(header), 1)}: the header must end with #CHROM POS ID REF "
                         f"ALT QUAL FILTER INFO, between tabs; give a whole VCF")
    return header


def read_records(path, header, genome, names, args):
    """Yields (line, [alleles of an ALT and of its REF, or why it is not scored]) of each record.

    names: {contig of the VCF: contig of the FASTA or None}, filled here. ValueError names the line.
    """
    n_columns, spellings = header[-1].count("\t") + 1, collections.defaultdict(list)
    for name in genome.contigs:
        spellings[data.region_key(name)].append(name)
    for n, line in itertools.islice(read_lines(path), len(header), None):
        if not line:
            continue                                         # no record
        columns = line.split("\t", 5)
        if line.count("\t") + 1 != n_columns or not "".join(columns[:5]).isprintable():
            raise ValueError(f"{path}: line {n}: not the {n_columns} columns of the header, or a control "
                             f"character before QUAL; mend it")
        if columns[0] not in names:
            alike = spellings[data.region_key(columns[0])]
            same = columns[0] if columns[0] in genome.contigs else None
            names[columns[0]] = same or (alike[0] if len(alike) == 1 else None)
        yield line, read_alleles(f"{path}: line {n}", columns, names[columns[0]], genome, args)


def read_alleles(place, columns, contig, genome, args):
    """Returns for each ALT of a record its Alleles [ALT, REF], or why it is not scored."""
    chrom, pos, _, ref, alts = columns[:5]
    if not re.fullmatch(r"\d{1,15}", pos, re.A) or not re.fullmatch(LETTERS, ref, re.I):
        raise ValueError(f"{place}: POS {data.quoted(pos)} and REF {data.quoted(ref)}: not a number and DNA "
                         f"letters; correct it")
    start, size, wrong = int(pos) - 1, genome.contigs.get(contig), None
    if not size:
        wrong, there = "contig not in FASTA", f"has {', '.join([*genome.contigs][:5])} ..."
    elif not 0 <= start <= size - len(ref):
        wrong, there = "position outside contig", f"has {size:,} bases of {contig}"
    elif (there := genome.fetch(contig, start, start + len(ref))) != data.decode(data.encode(ref)):
        wrong, there = "REF differs from FASTA", f"has {data.quoted(there)}"
    if wrong and not args.skip_mismatch:
        raise ValueError(f"{place}: {chrom}:{pos} {data.quoted(ref)}: {wrong}, which {there}; use the genome "
                         f"of the calls, or --skip_mismatch to leave such records unscored")
    found = [(alt.upper(), why_not(place, ref, alt)) for alt in alts.split(",")]
    return [wrong or why or trimmed(contig, start, ref.upper(), alt, args.limit) for alt, why in found]


def why_not(place, ref, alt):
    """Returns why an ALT is not scored, None if it can be; ValueError if it is not an allele."""
    if DNA.fullmatch(ref) and DNA.fullmatch(alt):
        return "ALT equals REF" if alt.upper() == ref.upper() else None
    for reason, pattern in UNSCORED.items():
        if re.fullmatch(pattern, alt, re.I):
            return reason
    raise ValueError(f"{place}: ALT {data.quoted(alt)} is not an allele; use DNA letters, <NAME>, * or .")


def trimmed(contig, start, ref, alt, limit):
    """Returns the Alleles [ALT, REF] without common end, then common start; or that they are too long."""
    end = start + len(ref)
    n = len(os.path.commonprefix([ref[::-1], alt[::-1]]))
    ref, alt, end = ref[:len(ref) - n], alt[:len(alt) - n], end - n
    n = len(os.path.commonprefix([ref, alt]))
    pair = [Allele(contig, start + n, end, int(len(ref) != len(alt)), len(x) - n, x[n:]) for x in (alt, ref)]
    return pair if max(allele.length for allele in pair) <= limit else f"longer than {limit} bases"


def cut_window(genome, allele, size, strand):
    """Returns the window (<= size,) around this allele, and where in it the allele begins.

    The allele is in the middle, unless the contig ends. Strand "-": the window of the contig's other strand.
    """
    at, turn = genome.offsets[allele.contig], slice(None, None, 1 if strand == "+" else -1)
    before, after = (allele.start, genome.contigs[allele.contig] - allele.end)[turn]
    left = min(max((size - allele.end + allele.start) // 2, size - allele.length - after), before)
    sides = left, min(size - allele.length - left, after)
    start, end = at + allele.start, at + allele.end
    codes = np.concatenate([genome.bases[start - sides[turn][0]:start], data.encode(allele.bases),
                            genome.bases[end:end + sides[turn][1]]])
    return codes if strand == "+" else data.reverse_complement(codes), left


def bert_lm(net, tokens, mask, owner=None):
    """Returns what masked_lm needs: ids of the k-mers (M, T), -1: none; their first bases (T,); k; logits."""
    def logits(one, masked):
        inputs = tokens[one].masked_fill(masked, data.MASK)
        return net.bert.decode(net.bert.encode(inputs, None if mask is None else mask[one])[masked])
    starts = (torch.arange(tokens.shape[1], device=tokens.device) - 1) * net.spec["stride"]          # [CLS]
    return tokens.masked_fill(tokens <= data.MASK, -1), starts, net.spec["k"], logits


def mixer_lm(net, one_hot, lengths, owner=None):
    """Returns the same as bert_lm for a ChordMixer or Encoder, of single bases: ids are their channels."""
    def logits(one, masked):
        inputs = one_hot[one].masked_fill(masked[..., None], 0)
        return net.base(net.states(inputs, None if lengths is None else lengths[one])[masked])
    ids = one_hot.argmax(-1).masked_fill(~one_hot[..., :4].any(-1), -1)
    return ids, torch.arange(ids.shape[1], device=ids.device), 1, logits


LM = {"bert": bert_lm, "mixer": mixer_lm}


@torch.no_grad()
def masked_lm(model, rows, alleles, spans):
    """Returns the mean log P (M, 1) of each allele's tokens in its span (M, 2), all of which are masked.

    rows: windows of the sorted alleles; those that are equal once masked share a forward pass. A token with
    an N is neither masked nor counted; NaN where none is left.
    """
    net, size, parts = model.net, model.micro_batch_size, []
    rows, spans = data.on_device(rows, model.device), torch.from_numpy(spans).to(model.device)
    new = [i for i in range(len(alleles)) if not i or alleles[i][:-1] != alleles[i - 1][:-1]]
    edges, device = np.array([*new, len(alleles)]), rows.bases.device
    with training.autocast(device, net.spec["dtype"]):
        for low in training.until_stopped(range(0, len(new), size)):
            part = edges[low:low + size + 1]
            index, one = np.arange(part[0], part[-1]), part[:-1] - part[0]
            ids, starts, width, logits = LM[net.spec["kind"]](net, *net.inputs(rows, index))
            span = spans[index][:, :, None]
            own = (starts + width > span[:, 0]) & (starts < span[:, 1]) & (ids >= 0)              # (M, T)
            masked = own[one]                                # (S, T), of the windows that differ
            log_p = logits(one, masked).float().log_softmax(-1)                # (N, V)
            number = (masked.flatten().cumsum(0) - 1).view_as(masked)          # (S, T): which of N
            number = number.repeat_interleave(torch.from_numpy(np.diff(part)).to(device), 0)[own]
            total = log_p.new_zeros(len(own)).index_add(0, own.nonzero()[:, 0], log_p[number, ids[own]])
            parts.append((total / own.sum(1))[:, None].cpu().numpy())
    return np.concatenate(parts)


def distances(a, b):
    """Returns cosine and Euclidean distances of the rows of a and b (n, C): (n, 2)."""
    a, b = (torch.from_numpy(x).double() for x in (a, b))
    return torch.stack([1 - F.cosine_similarity(a, b), (a - b).norm(dim=1)], 1).numpy()


def choose_score(model, embedding):
    """Returns {column: what it is}, outputs(rows, alleles, spans), and what combines those of ALT and REF."""
    spec = model.net.spec
    if embedding:
        model.at_layer(-1)                                   # ValueError of a network that has none
        columns = {"cosine": "cosine distance of embeddings", "l2": "Euclidean distance of embeddings"}
        return columns, lambda rows, *_: model.embed(rows), distances
    if "classes" in spec:
        what, scale = (("value", lambda x: x) if spec["regression"] else
                       ("log P", special.log_expit) if spec["multilabel"] else
                       ("log P", functools.partial(special.log_softmax, axis=1)))
        columns = {f"d_{name}": f"change of the {what} of {name}" for name in model.classes()}
        return columns, lambda rows, *_: scale(model.apply(rows)), np.subtract
    if spec["kind"] not in LM or spec["kind"] == "bert" and not model.net.bert.ln_head.weight.any():
        raise ValueError(f"--init {model.init}: has no masked-LM head that is read; use --embedding, or "
                         f"fine-tune it")
    return {"score": "mean log P(ALT) - mean log P(REF)"}, functools.partial(masked_lm, model), np.subtract


def open_scorer(args):
    """Returns the Model; a pretrained FinDNA network gets its layer to the bases as net.base."""
    if args.init.startswith("findna:"):
        weights = models.load_findna(args.init[7:], args.eval_network)[1]
    elif not args.init.startswith("hf:"):
        state = training.load(args.init)
        if state["method"] == "findna":
            args.eval_network = args.eval_network or finetune.choose_network(args.init, state)
        weights = state.get(args.eval_network, state["model"])
    model = open_model(args)
    net = model.net
    if net.spec.get("pairs"):
        raise ValueError(f"--init {args.init}: fine-tuned on pairs of sequences; use a model of single ones")
    args.strands, net.spec["strands"] = net.spec["strands"], "forward"         # windows differ by the strand
    if net.spec["kind"] == "mixer" and "classes" not in net.spec and not args.embedding:
        net.spec["pool"] = "cls"                             # inputs then end with [CLS], as in pretraining
        net.base = torch.nn.Linear(net.backbone.config.n_embd, 5).to(model.device)
        net.base.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")})
    return model


def window_size(net, wanted, in_parts):
    """Returns the bases of a window: --window, or all that the model reads at once, up to its last k-mer.
    in_parts: outputs or embeddings, for which a network cuts a longer window into parts, are wanted."""
    spec, k, stride = net.spec, net.spec.get("k", 1), net.spec.get("stride") or 1
    size = {"bert": lambda: (spec["bert"]["block_size"] - 3) * stride + k,
            "mixer": lambda: spec["mixer"]["length"] - spec["n_cls"],
            "hf": lambda: int(net.bases_in_room)}.get(spec["kind"], lambda: net.length)()
    in_parts = in_parts and net.BODY and spec["long"] == "chunk"
    most = wanted if in_parts or spec["kind"] == "mixer" and net.room is None else size    # ChordMixer: any
    if wanted and not k <= wanted <= most:
        raise ValueError(f"--window {wanted}: the model reads {k} to {size:,} bases; use one of these")
    return ((wanted or size) - k) // stride * stride + k


def score_block(pairs, genome, score, args):
    """Returns scores (n, columns) of pairs of Alleles, means over strands; how many ALT windows have N."""
    alleles, values = sorted(set(itertools.chain(*pairs))), []
    number = {allele: i for i, allele in enumerate(alleles)}
    alt, ref = np.array([[number[allele] for allele in pair] for pair in pairs]).T
    for strand in ("+-" if args.strands == "average" else "+"):
        windows, first = zip(*(cut_window(genome, allele, args.window, strand) for allele in alleles))
        rows = data.Rows(np.concatenate(windows), np.cumsum([0, *map(len, windows)]), None, {})
        spans = np.array([[at - a.pad, at + a.length + a.pad] for at, a in zip(first, alleles)])
        outputs = score[1](rows, alleles, spans)
        values.append(score[2](outputs[alt], outputs[ref]))
    return np.mean(values, 0), int(np.logical_or.reduceat(rows.bases > 3, rows.offsets[:-1])[alt].sum())


def bgzip(text):
    """Yields bytes as blocks of a BGZF file, which tabix can index; b"" gives its end block."""
    for part in (text[i:i + 65_280] for i in range(0, max(len(text), 1), 65_280)):
        deflate = zlib.compressobj(wbits=-15)
        packed = deflate.compress(part) + deflate.flush()
        head = struct.pack("<4BI2BH2B2H", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(packed) + 25)
        yield head + packed + struct.pack("<2I", zlib.crc32(part), len(part))


def tsv_text(line, results, text):
    """Returns the rows of a record, one for each ALT; results: (numbers as text, reason) of each."""
    *start, alts = line.split("\t", 5)[:5]
    rows = ([*map(text, [*start, alt]), *values, why] for alt, (values, why) in zip(alts.split(","), results))
    return "".join("\t".join(row) + "\n" for row in rows)


def vcf_text(line, results, fields):
    """Returns the record with our INFO fields: lists over the ALTs."""
    columns, (values, reasons) = line.split("\t"), zip(*results)
    added = [f"{field}={','.join(x or '.' for x in column)}" for field, column in zip(fields, zip(*values))]
    added *= columns[4] != "."                               # without an ALT there is nothing to list
    if any(reasons):
        added.append(f"{INFO}_not={','.join(why.replace(' ', '_') or '.' for why in reasons)}")
    columns[7] = ";".join([*[columns[7]] * (columns[7] != "."), *added])
    return "\t".join(columns) + "\n"


def vcf_header(header, columns, init):
    """Returns the header with our INFO fields, and their names. ValueError if it has such fields already."""
    if any(line.startswith(f"##INFO=<ID={INFO}") for line in header):
        raise ValueError(f"--out: the VCF has an INFO field {INFO} already; remove it there, or name a .tsv")
    fields = [INFO] if "score" in columns else [f"{INFO}_{i}" for i in range(len(columns))]
    init = "".join(c for c in os.path.basename(init) if c.isprintable())
    texts = [f"{what}; model {init}".replace("\\", "\\\\").replace('"', '\\"') for what in columns.values()]
    lines = [f'##INFO=<ID={field},Number=A,Type=Float,Description="{text}">'
             for field, text in zip(fields, texts)]
    lines.append(f'##INFO=<ID={INFO}_not,Number=.,Type=String,Description="why an ALT has no score">')
    return [*header[:-1], *lines, header[-1]], fields


def score_records(records, genome, score, args, counts):
    """Yields (line, [(numbers as text, why there are none)] of its ALTs) of each record; counts them."""
    records, none = iter(records), [""] * len(score[0])
    while block := list(itertools.islice(records, BLOCK)):
        pairs = [x for _, found in block for x in found if isinstance(x, list)]
        values, with_n = score_block(pairs, genome, score, args) if pairs else ((), 0)
        values = iter([([f"{x:.6g}" for x in row], "") if np.isfinite(row).all() else (none, "no base read")
                       for row in values])
        for line, found in block:
            results = [next(values) if isinstance(x, list) else (none, x) for x in found]
            counts.update(["records", *(why or "scored" for _, why in results)])
            yield line, results
        counts["with N in the window"] += with_n


def write_scores(header, genome, score, args):
    """Writes all records, in their order, to --out; prints what became of them."""
    names, counts = {}, collections.Counter(records=0, scored=0)
    out, text = args.out or output(args, ".variants.tsv"), excel_safe if args.excel_safe else str
    for _ in read_records(args.file, header, genome, names, args):
        pass                                                 # what is wrong shows before the first score
    if changed := [f"{name} is {contig}" for name, contig in names.items() if contig not in (None, name)]:
        print(f"contigs with another name in the FASTA: {', '.join(changed)[:200]}", flush=True)
    head, make = ["\t".join(["chrom", "pos", "id", "ref", "alt", *map(text, score[0]), "reason"])], tsv_text
    if not out.endswith(".tsv"):
        (head, text), make = vcf_header(header, score[0], args.init), vcf_text
    with data.new_path(out) as f:
        def put(text):
            text = text.encode("utf-8", "surrogateescape")
            f.writelines(bgzip(text) if out.endswith(".gz") else [text])
        put("".join(f"{line}\n" for line in head))
        records = read_records(args.file, header, genome, names, args)
        records = score_records(records, genome, score, args, counts)
        while part := "".join(make(*record, text) for record in itertools.islice(records, BLOCK)):
            put(part)
        put("")                                              # ends a .gz
    print(f"wrote {out}")
    say_counts(counts)


def main(args):
    """Opens the VCF, the model and the genome; writes the scores."""
    if args.out and not args.out.endswith((".tsv", ".vcf", ".vcf.gz")):
        raise ValueError(f"--out {args.out}: name a .tsv, .vcf or .vcf.gz file")
    header, model = read_header(args.file), open_scorer(args)
    score = choose_score(model, args.embedding)
    args.window = window_size(model.net, args.window, in_parts="score" not in score[0])
    args.limit = min(args.window // 2, LONGEST if "score" in score[0] else args.window)
    genome = data.Genome(args.fasta, args.cache)
    genome.bases = np.asarray(genome.bases)                  # slices of a memmap are slow
    print(f"scores   {', '.join(score[0].values())}; windows of {args.window:,} bases; alleles of up to "
          f"{args.limit:,}", flush=True)
    write_scores(header, genome, score, args)


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    add = add_model_flags(parser)
    add("file", type=file_name, metavar="VCF", help="plain, gzip or bgzip")
    add("--fasta", type=file_name, nargs="+", required=True, help="genome of the calls, plain or gzip")
    add("--cache", type=file_name, help="folder for the packed genome (default: beside the FASTA)")
    add("--embedding", action="store_true", help="distances of the mean embeddings of ALT and REF")
    add("--window", type=number(int, 1), help="bases around a variant (default: all that the model reads)")
    add("--skip_mismatch", action="store_true", help="do not stop at records that the FASTA contradicts")
    add("--excel_safe", action="store_true", help="an apostrophe before cells that begin with =, +, - or @")
    parser.set_defaults(step=None, long=None, dtype="float32")                 # scores are small differences
    with training.user_errors():
        main(parser.parse_args())
