"""Gets public data and leaves verified files where data.py looks for them, or says what to fetch by hand.

    python -m tools.download                                       what there is: size, how it is verified, licence
    python -m tools.download hg38                                  the genome that pretraining reads by default
    python -m tools.download gue deepstarr gb/human_enhancers_cohn benchmark sets, as in finetune.py --task
    python -m tools.download gue --check                           verify what is there: no network, nothing written

A download grows in DATA_DIR/partial, where the same command goes on after a cut, and moves to its place once
it is verified: by its published checksum, else ("rows") by a strict read of it and the published number of
rows. DATA_DIR/manifest.json says what came from where, when, with which sha256. Proxies: https_proxy;
HF_ENDPOINT stands in for huggingface.co. Exit code 2: a file is not there or not sound; how to get it by hand
is printed.
"""
import argparse
import contextlib
import datetime
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import namedtuple

from tqdm import tqdm

import data
import models
import training

TIMEOUT, TRIES, PAUSE = 30, 5, 1                             # seconds; without progress; first seconds
LOCAL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "EFBIG")}
HUB, GITHUB = "https://huggingface.co", "https://raw.githubusercontent.com/roysoumya"
GUE = (HUB + "/datasets/leannmlindsey/GUE/resolve/240df51a2cd2c0fb1d88efffaf86e8d1e477f932/GUE/{}/{}.csv",
       HUB + "/datasets/dnagpt/GUE/resolve/e0bc5eec01b46aca338e34ed4ab8ba97e096fe3e/{}/{}.csv")
ZENODO = "https://zenodo.org/records/{}/files/{}?download=1"
STARR = (ZENODO.format(5502060, "{}"), "https://data.starklab.org/almeida/DeepSTARR/Data/{}")
FEW_SHOT = GITHUB + "/GeneMask/c7614461323015ffcbbdb39fc4778e9255ddfcab/Data-B_fewshot-task-datasets/{}"
SILENCER = GITHUB + "/curriculum-GeneMask/d0bad0d3cf49c65acf308cd0f255dfee42194f2a/data/{}"
SHOTS = {"prom_core": (10, 50, 100, 500, 1000), "prom_300": (10, 50, 100, 500, 1000),
         "cohn_enh": (10, 50, 100, 500), "splice_40": (10, 50, 100, 500), "silencer": (10, 50)}
ENSEMBL = ("https://ftp.ensembl.org/pub/release-110/fasta/{}/cdna/{}",         # FinDNA names no release:
           "https://ftp.ebi.ac.uk/ensemblorg/pub/release-110/fasta/{}/cdna/{}")  # counts may differ
ASSEMBLIES = {"Mus_musculus": "GRCm39", "Mus_spretus": "SPRET_EiJ_v1",
              "Chelonoidis_abingdonii": "ASM359739v1", "Gopherus_agassizii": "ASM289641v1"}
DIGESTS = dict(line.split() for line in """
hg38.fa.gz c1dd87068c254eb53d944f71e51d1311964fce8de24d6fc0effc9c61c01527d4
DeepSTARR/Sequences_Train.fa fe474a31c23db2daf7dc4d1fc49a8e5a
DeepSTARR/Sequences_Val.fa 9d1a0e5c9228aa033378af93074109e6
DeepSTARR/Sequences_Test.fa c2d831a6e2cfb9345fa5e52de76bb453
DeepSTARR/Sequences_activity_Train.txt 4e65afa021fd426c74dbf24c31b8bbf9
DeepSTARR/Sequences_activity_Val.txt 5f30e863b2239e4f9ade6e7b81b3ff3c
DeepSTARR/Sequences_activity_Test.txt 011690ca80cf967d56fefd0c1386419f
fewshot/Cohn-enh/10/train.tsv 6a54e65421ea963d2a6dd36e1b6bfa435106c658700e0c6c9007a1580720c8ec
fewshot/Cohn-enh/50/train.tsv 5870edee4b0664537e0fcf114223b3687cc072b613a22a5ee6f2289ced7aff88
fewshot/Cohn-enh/500/train.tsv dcd898fbea46410d0578356e51571822dba2f362bb608f6260ff31c9fd79d124
fewshot/Prom-300/10/train.tsv ac302116db0922ea0c76ac9ce76d02b6ba690ca0fc512ec3ca8e56fbc9a8e4cb
fewshot/Prom-300/100/train.tsv 6febd8539df880dd3d7e4d79a124a5e6620c6a06831d1e53436167820e1c0153
fewshot/Prom-300/50/train.tsv ed431ec0e6ccccab239865b3eec371d4b6a7a58283154d0f445918193e9d5e81
fewshot/Prom-300/500/train.tsv 2379fa2b9f7775679473f017e27c5954f6a4d12aab0943ba86ed3600c114f1ba
fewshot/Prom-core/10/train.tsv 2981c2c47b1981a7ebbeddd679c4132ecfd9a7594a8afe32f363b113c0dcd881
fewshot/Prom-core/100/train.tsv 740b3c1e50307a22c1a547e83c810b89f5c69ad4313ecf174903ca630811908c
fewshot/Prom-core/50/train.tsv a95733e59e3ca76d82464f6fae4373d6bc80e424090b2bc15ab5c0d1bb038c8a
fewshot/Prom-core/500/train.tsv f37239f9c8eb45b1c0831b829cf6d6960e1afd29d3e489d3b8e7118c254a606b
fewshot/Prom-core/test.tsv 7a294f8b61ff5ee6756ba80e55e3c5f64d21fb94dc45b312bd9f22de4c76665c
fewshot/Splice-40/10/train_splice40_10.tsv 5894d61218db3ad7bcddfaa037ea10a1fd3fafb18c2e0b5c7b1b2d5e45b5f942
fewshot/Splice-40/50/train_splice40_50.tsv 6f540802c6bb203d56d2f6a6aea1b538dd28a753eb782730f4cb2df5cc387ffa
fewshot/Splice-40/500/train_splice40_500.tsv 578df4e841f32b735710ea80d703aacd52f95f5171a29d408eb1274f452e691f
fewshot/Splice-40/test.tsv 496445d8c0b4b5b1e9d2c1089320d1d7ca534f999eea8cf0ed84e4310cd09053
fewshot/silencer/10/dev.tsv df7dc96fba02568257fb95463e7333319bec6571630e6881f0e97a515fa99c7a
fewshot/silencer/10/train.tsv 7d9ccd78b98b4024436cd9d04dcc70656baa6de34d0f2039e3832a0a4b27e38a
""".strip().splitlines())
CITATIONS = {
    "GUE": "Zhou et al., DNABERT-2, 2023", "DeepSTARR": "de Almeida et al., DeepSTARR, Nature Genetics, 2022",
    "GenomicBenchmarks": "Gresova et al., Genomic benchmarks, BMC Genomic Data, 2023",
    "MTcDNA": "Ensembl; the task: Yu et al., FinDNA", "few-shot": "Roy et al., GeneMask, 2023; CM-GEMS"}

# path: where the download lands, below data_dir; size: bytes, about; rows: {file below data_dir: published
# rows, or None}, the path itself or what is made of an archive; digest: md5, sha256 or '' (unknown)
ALGORITHM = {0: "", 32: "md5", 64: "sha256"}                 # by the length of a digest
File = namedtuple("File", "path urls size rows digest")
Source = namedtuple("Source", "files licence citation check")                  # check: the next command


def plain_file(path, urls, size, n=None):
    """A file that is kept as it comes, of n rows where that is known."""
    return File(path, list(urls), size, {path: n}, DIGESTS.get(path, ""))


def task_files(task):
    """The files of a benchmark set."""
    folder, name, rows = task.folder, task.folder.split("/")[-1], task.rows
    low, high = (int(n) for n in (task.length.split("-") * 2)[:2])             # bases
    if task.suite == "GUE":                                  # the first place renames the folders
        own = folder.removeprefix("GUE/")
        theirs = own.replace("EMP", "emp").replace("tf/", "human_tf_").replace("prom/", "").replace("/", "_")
        return [plain_file(f"{folder}/{split}.csv", [GUE[0].format(theirs, split), GUE[1].format(own, split)],
                           n * (high + 3), n) for split, n in rows.items()]
    if task.suite == "GenomicBenchmarks":                    # a zip of one file a sequence -> a table a split
        made = {f"{folder}/{split}.csv": n for split, n in rows.items()}
        size = sum(rows.values()) * ((low + high) // 2 + 350)                  # 350: of a file in a zip
        return [File(f"{folder}_v0.zip", [ZENODO.format(16605299, f"{name}_v0.zip")], size, made, "")]
    if task.suite == "MTcDNA":
        files = [(name.lower(), f"{name}.{ASSEMBLIES[name]}.cdna.all.fa.gz") for name in data.MTCDNA]
        return [plain_file(f"{folder}/{file}", [url.format(species, file) for url in ENSEMBL], 60e6)
                for species, file in files]
    if task.suite == "DeepSTARR":
        files = [(name.format(split), rows[key]) for name in ("Sequences_{}.fa", "Sequences_activity_{}.txt")
                 for split, key in (("Train", "train"), ("Val", "dev"), ("Test", "test"))]
        return [plain_file(f"{folder}/{file}", [url.format(file) for url in STARR], 280 * n, n)
                for file, n in files]
    return few_shot_files(task, high)


def few_shot_files(task, length):
    """Train files of each number of shots, and the test file or what stands in for it."""
    train, n_sets, *tests = data.FEW_SHOT[task.name]
    wanted = {train.format(n): n * n_sets * len(task.classes) for n in SHOTS[task.name]}
    if task.rows:                                            # with a test of its own
        wanted |= {tests[0].format(n): task.rows["test"] for n in SHOTS[task.name]}
    files, source = [], SILENCER if task.name == "silencer" else FEW_SHOT
    for name, n in wanted.items():                           # 6-mers with blanks between them
        path = f"{task.folder}/{name}"
        theirs = path.removeprefix("fewshot/").replace("Splice-40/test", "Splice-40/full-dataset/test")
        files.append(plain_file(path, [source.format(theirs)], n * 7 * length, n))
    if task.name == "prom_300":                              # GUE's test set of the same promoters stands in
        test, = (file for file in task_files(data.TASKS["pd/all"]) if "/test" in file.path)
        files.append(plain_file(f"{task.folder}/{tests[1]}", test.urls, test.size, *test.rows.values()))
    return files + (task_files(data.TASKS["gb/human_enhancers_cohn"]) if task.name == "cohn_enh" else [])


def source_name(task):
    """Name here of a benchmark set: DeepSTARR and MTcDNA are one download each."""
    return task.suite.lower() if task.suite in ("DeepSTARR", "MTcDNA") else task.name


SOURCES = {
    "hg38": Source([plain_file("hg38.fa.gz", [data.HG38_URL], 983_659_424)], "free (UCSC)",
                   "UCSC Genome Browser; Genome Reference Consortium", "python randommask.py --data_dir {}"),
    "sacCer3": Source([plain_file("sacCer3.fa.gz", [data.HG38_URL.replace("hg38", "sacCer3")], 4e6, 17)],
                      "free (UCSC)", "Saccharomyces Genome Database, R64",
                      "python randommask.py --genome {}/sacCer3.fa.gz"),
    "dnabert6": Source([plain_file(f"DNA_bert_6/{name}", [f"{HUB}/{of}/DNA_bert_6/resolve/main/{name}"
                                                          for of in ("zhihan1996", "armheb")], size)
                        for name, size in (("config.json", 2e3), ("pytorch_model.bin", 359e6))], "Apache-2.0",
                       "Ji et al., DNABERT, 2021", "python finetune.py --task emp --init hf:{}/DNA_bert_6")}
SOURCES |= {source_name(task): Source(task_files(task), task.licence, CITATIONS[task.suite],
                                      f"python data.py {task.name} --data_dir {{}}")
            for task in data.TASKS.values() if task.suite != "demo"}
GROUPS = {"gue": data.GUE, "gb": [name for name in data.TASKS if name.startswith("gb/")]} | data.GROUPS


def source_names(args):
    """Names of sources, groups and tasks -> names of sources, each once."""
    found = []
    for name in args:
        if name not in SOURCES and name not in GROUPS and name not in data.TASKS or name == "demo":
            raise ValueError(f"{data.quoted(name)}: unknown; use {' '.join([*SOURCES, *GROUPS])}")
        tasks = [name] if name in SOURCES else GROUPS.get(name, [name])
        found += [task if task in SOURCES else source_name(data.TASKS[task]) for task in tasks]
    return list(dict.fromkeys(found))


def hub(urls):
    """These urls, at the mirror HF_ENDPOINT where they are huggingface.co's."""
    return [url.replace(HUB, os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB) for url in urls]


def check_url(url):
    """ValueError unless https (http is for tests on this machine)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) != ("http", "127.0.0.1"):
        raise ValueError(f"{data.quoted(url)}: not https, refused")
    return url


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return super().redirect_request(req, fp, code, msg, headers, check_url(newurl))


def receive(url, path, cap):
    """One request: the rest of what is at path, or all of it where the server has another file by now. Beside
    it, path.from keeps the url and the server's tag. ValueError: in vain to ask again."""
    have, old, note = os.path.getsize(path) if os.path.exists(path) else 0, None, path + ".from"
    if os.path.exists(note):
        with open(note) as f, contextlib.suppress(ValueError):
            old = json.load(f).get(url)
    request = urllib.request.Request(url, headers={"User-Agent": "nanoDNA download.py"})
    if have and old:
        request.headers |= {"Range": f"bytes={have}-", "If-range": old}
    with urllib.request.build_opener(HttpsOnly).open(request, timeout=TIMEOUT) as reply:
        get, resumed = reply.headers.get, reply.status == 206
        tag = get("ETag") or get("Last-Modified")
        if resumed and (tag != old or not get("Content-Range", "").startswith(f"bytes {have}-")):
            os.unlink(path)
            raise ConnectionError("another file than before")
        if reply.status not in (200, 206) or get("Content-Encoding", "identity") != "identity":
            raise ValueError(f"HTTP {reply.status}, {data.quoted(get('Content-Encoding'))}: not the plain file")
        have *= resumed
        total = have + int(get("Content-Length")) if get("Content-Length") else None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab" if resumed else "wb") as f, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            with open(note, "w") as g:
                json.dump({url: tag}, g)
            while max(have, total or 0) <= cap and (chunk := reply.read1(1 << 18)):
                f.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    if max(have, total or 0) > cap:
        os.unlink(path)
        raise ValueError(f"more than {cap:,.0f} bytes: too large for this file")
    if have < (total or 0):
        raise ConnectionError(f"cut after {have:,} of {total:,} bytes")


def fetch(url, path, cap, unreachable):
    """Asks a url until all is there, or TRIES times without progress. ValueError: why it is not."""
    host, tries, best = urllib.parse.urlsplit(check_url(url)).netloc, 0, 0
    if host in unreachable:
        raise ValueError("no answer before")
    while tries < TRIES:
        try:
            return receive(url, path, cap)
        except urllib.error.HTTPError as e:
            reason = training.plain(f"HTTP {e.code} {e.reason}")
            if e.code == 416:                                # nothing behind what we have: another file
                os.unlink(path)
            elif e.code < 500 and e.code not in (408, 429):
                raise ValueError(reason) from None
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in LOCAL:
                raise OSError(f"cannot write {path}: {e.strerror}; make room, the same command goes "
                              f"on") from None
            reason = training.plain(str(getattr(e, "reason", e)) or repr(e))
        size = os.path.getsize(path) if os.path.exists(path) else 0
        tries, best = 1 if size > best else tries + 1, max(size, best)
        print(f"  {host}: {reason}; try {tries} of {TRIES} without progress", flush=True)
        time.sleep(PAUSE * 2 ** (tries - 1) * (tries < TRIES))
    if not best:
        unreachable.add(host)
    raise ValueError(f"{reason} ({TRIES} tries)")


def count_rows(path):
    """Rows of a table, records of a FASTA, tensors of weights: read strictly, to the end."""
    name = os.path.basename(path)
    if name.endswith(".json"):
        try:
            with open(path) as f:
                return len(json.load(f))
        except (TypeError, RecursionError) as e:             # a number; lists without end
            raise ValueError(f"not the JSON of a config ({data.quoted(str(e))})") from None
    if name.endswith(".bin"):
        return len(models.hf_tensors(os.path.dirname(path), [name])[0])
    if name.endswith((".fa", ".fa.gz")):
        return sum(1 for _ in data.fasta_records(path))
    if "activity" in name:
        return len(data.read_columns(path, {name: [name.lower()] for name in data.TASKS["eap"].classes})[1])
    return len(data.read_table(path)[0])


def checksum(path, algorithm):
    """Hexadecimal md5 or sha256 of a file."""
    found = hashlib.new(algorithm)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def check_kind(path):
    """ValueError for what servers send in place of data."""
    with open(path, "rb") as f:
        head = f.read(512).lstrip()
    for wrong, what in ((not head, "empty"), (head[:1] == b"<", "an HTML or XML page"),
                        (head.startswith(b"version https://git-lfs"), "a git-LFS pointer"),
                        (path.endswith(".gz") and head[:2] != b"\x1f\x8b", "not gzip"),
                        (path.endswith(".zip") and head[:2] != b"PK", "not a zip archive")):
        if wrong:
            raise ValueError(f"{what}, not the data")


def verify(path, digest, rows, old={}):
    """The manifest's entry of a sound file: by its checksum, as it was verified before (old), or by reading
    it to the end. ValueError: why it is not sound."""
    check_kind(path)
    sha256, how = checksum(path, "sha256"), ALGORITHM[len(digest)]
    if digest and (got := checksum(path, how)) != digest:
        raise ValueError(f"{how} {got}, but the published file has {digest}")
    if not digest:
        if old.get("sha256") == sha256:
            return old
        n, how = count_rows(path), "rows" if rows else "read to its end, no published checksum or rows"
        if rows not in (None, n):
            raise ValueError(f"{n:,} rows, but the published file has {rows:,}")
        rows = n
    return {"sha256": sha256, "bytes": os.path.getsize(path), "rows": rows, "verified": how}


def unpack(archive, made, classes):
    """A zip of one-sequence files .../SPLIT/CLASS/NAME.txt -> tables, in the order of classes and names.
    Members are read by name and never written under theirs. made: {path of a table: its rows}."""
    try:
        with zipfile.ZipFile(archive) as z:
            every = sorted(z.infolist(), key=lambda member: member.filename)
            for parts in (member.filename.split("/") for member in every):
                if ".." in parts or not parts[0] or "\\" in "".join(parts):
                    raise ValueError(f"member {data.quoted('/'.join(parts))} leaves its folder")
            for path, n in made.items():
                split = os.path.basename(path).removesuffix(".csv")
                wanted = [re.compile(f"(.*/)?{split}/{name}/[^/]+[.]txt") for name in classes]
                found = [(label, member) for label, pattern in enumerate(wanted) for member in every
                         if pattern.fullmatch(member.filename)]
                stored = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED              # others raise what they like
                if any(member.compress_type not in stored for member in every):
                    raise zipfile.BadZipFile("compression method not supported")
                if len(found) != n or any(member.file_size > 1 << 14 for _, member in found):
                    raise ValueError(f"{len(found):,} sequences of {split} (or too long); published {n:,}")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w") as f:
                    f.write("sequence,label\n")
                    for label, member in found:              # z.read would inflate beyond the size
                        with z.open(member) as text:
                            f.write(f"{text.read(1 << 14).decode().strip()},{label}\n")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError) as e:
        raise ValueError(f"damaged zip archive ({data.quoted(str(e))})") from None


def verify_download(file, partial):
    """Manifest's entries by path of a download that is sound, once it is unpacked."""
    landed, made = os.path.join(partial, file.path), {os.path.join(partial, path): path for path in file.rows}
    if landed not in made:
        check_kind(landed)
        classes = data.TASKS["gb/" + os.path.basename(landed).removesuffix("_v0.zip")].classes
        unpack(landed, {part: file.rows[path] for part, path in made.items()}, classes)
    return {path: verify(part, file.digest, file.rows[path]) for part, path in made.items()}


def download(file, data_dir, unreachable):
    """Leaves a file's verified data in place: from what lies whole in partial, else from its urls in order.
    Returns the manifest's entries. ValueError: what each url gave instead."""
    partial, reasons, entries, url = os.path.join(data_dir, "partial"), [], {}, None
    landed = os.path.join(partial, file.path)
    if os.path.exists(landed):                               # put there by hand, or killed at the last moment
        with contextlib.suppress(ValueError):
            entries = verify_download(file, partial)
    for url in [] if entries else hub(file.urls):
        try:
            fetch(url, landed, 2 * file.size + 1e6, unreachable)
            try:
                entries = verify_download(file, partial)
                break
            except ValueError:
                remove(landed)                               # no start for another try
                raise
        except ValueError as e:
            reasons.append(f"{urllib.parse.urlsplit(url).netloc}: {e}")
    if not entries:
        raise ValueError("; ".join(reasons))
    for path in entries:
        os.makedirs(os.path.dirname(os.path.join(data_dir, path)), exist_ok=True)
        os.replace(os.path.join(partial, path), os.path.join(data_dir, path))
    remove(landed)
    return {path: {"url": url, "date": datetime.date.today().isoformat()} | entry
            for path, entry in entries.items()}


def remove(landed):
    """Removes a download with what belongs to it, and its folders in partial where they are empty."""
    for path in (landed, landed + ".from"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.removedirs(os.path.dirname(landed))


def present(file, data_dir, manifest):
    """The manifest's entries of a file whose data are there and sound; {} where they are not all there."""
    found = {path: data.find(data_dir, path) for path in file.rows}
    entries = {}
    for path, place in found.items() if all(found.values()) else ():
        digest = file.digest if place == os.path.join(data_dir, file.path) else ""       # not of our own .gz
        try:
            old = manifest.get(path, {"url": None, "date": None})
            entries[path] = old | verify(place, digest, file.rows[path], old)
        except ValueError as e:
            raise ValueError(f"{place} is there, but {e}; move it away") from None
    return entries


def print_recipe(name, files, data_dir):
    """How to get files by hand."""
    source, quoted = SOURCES[name], shlex.quote(data_dir)
    print(f"\n{name} by hand: on a machine with internet, in this folder (or copy {quoted} here afterwards)")
    for file in files:
        place = os.path.join(data_dir, "" if file.path in file.rows else "partial", file.path)
        for prefix, url in zip(["  ", *["  # or: "] * 9], hub(file.urls)):
            print(f"{prefix}curl -fL --create-dirs -o {shlex.quote(place)} {shlex.quote(url)}")
        if file.path not in file.rows:
            of = os.path.basename(file.path).removesuffix("_v0.zip")
            print(f"  python -m tools.download {name} --data_dir {quoted}   # unpacks it, without network\n"
                  f"  # or: git clone https://github.com/ML-Bioinfo-CEITEC/genomic_benchmarks; copy its\n"
                  f"  # datasets/{of} to {quoted}/GenomicBenchmarks/coordinates/{of}; use --fasta GENOME.fa")
    print(f"  python -m tools.download {name} --check --data_dir {quoted} && {source.check.format(quoted)}",
          flush=True)


def open_data_dir(data_dir, names):
    """Locks data_dir/partial; ValueError where another download is at work there, or for want of space."""
    need = sum(file.size * (1 if file.path in file.rows else 2) for name in names
               for file in SOURCES[name].files if not all(data.find(data_dir, path) for path in file.rows))
    try:
        os.makedirs(os.path.join(data_dir, "partial"), exist_ok=True)
        lock = open(os.path.join(data_dir, "partial", "lock"), "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{lock.name}: another download is at work there; wait for it") from None
    except OSError:                                          # read-only: all may be there; or no locks there
        lock = None
    free = shutil.disk_usage(data_dir).free if os.path.isdir(data_dir) else need
    if free < need:
        raise ValueError(f"{data_dir}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed; make room, or "
                         f"use another --data_dir")
    return lock


def get(names, data_dir, only_check):
    """Verifies, and unless only_check gets, the files of these sources. ValueError, after the recipes of
    those that are not sound."""
    record, manifest, failed, unreachable = os.path.join(data_dir, "manifest.json"), {}, {}, set()
    if os.path.exists(record):
        with open(record) as f:
            try:
                manifest = {path: dict(entry) for path, entry in json.load(f).items()}
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{record}: damaged; remove it, the files are verified anew") from None
    for name in names:
        for file in SOURCES[name].files:
            try:
                entries = present(file, data_dir, manifest)
                if not entries and only_check:
                    raise ValueError("not there")
                entries = entries or download(file, data_dir, unreachable)
            except ValueError as e:
                print(f"{name}: {file.path}: {e}", flush=True)
                failed.setdefault(name, []).append(file)
                continue
            for path, entry in entries.items():
                print(f"{name}: {path}: sound ({entry['verified']}), {entry['bytes']:,} bytes", flush=True)
            if not only_check and manifest | entries != manifest:
                manifest |= entries
                with open(record + ".tmp", "w") as f:
                    json.dump(manifest, f, indent=1)
                os.replace(record + ".tmp", record)
    for name, files in failed.items():
        print_recipe(name, files, data_dir)
    if failed:
        raise ValueError(f"{sum(map(len, failed.values()))} files not sound ({', '.join(failed)}); run the "
                         f"same command again, or get them by hand as said above")


def print_sources():
    """What there is."""
    print("name | size | verified by | licence as stated | cite")
    for name, source in SOURCES.items():
        how = sorted({ALGORITHM[len(file.digest)] or "rows" * any(file.rows.values()) or "unconfirmed"
                      for file in source.files})
        size = sum(file.size for file in source.files) / 1e6
        print(f"{name} | {size:,.1f} MB | {', '.join(how)} | {source.licence} | {source.citation}")
    print(f"groups: {' '.join(GROUPS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="sources or groups (none: list them)")
    parser.add_argument("--data_dir", default="data", help="where the files go (%(default)s)")
    parser.add_argument("--check", action="store_true", help="verify only: no network, nothing written")
    args = parser.parse_args()
    for which in (signal.SIGTERM, signal.SIGINT):            # what is there stays in partial
        signal.signal(which, lambda *_: sys.exit(143))
    with training.user_errors():
        names = source_names(args.names)
        if not names:
            print_sources()
            raise SystemExit
        lock = None if args.check else open_data_dir(args.data_dir, names)
        get(names, args.data_dir, args.check)
