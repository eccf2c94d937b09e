"""Gets public data and leaves verified files where data.py looks for them, or says how to get them by hand.

    python -m tools.download                       list the sources: size, how they are verified, licence
    python -m tools.download hg38                  the genome that pretraining reads by default
    python -m tools.download gue deepstarr gb8     benchmark sets, as in finetune.py --task
    python -m tools.download gue --check           verify what is there: no network, nothing written

A download grows in DATA_DIR/partial, where the same command resumes it, and moves to its place once it is
verified: by its published checksum, else ("rows") by a strict read of it and the published number of rows.
DATA_DIR/manifest.json keeps the url, date and sha256 of each file. tools/downloads.tsv lists what is where.
Proxy: https_proxy; HF_ENDPOINT replaces huggingface.co. Exit code 2: a file is missing or damaged.
"""
import contextlib
import csv
import datetime
import errno
import fcntl
import http.client
import json
import os
import re
import shlex
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import namedtuple

import training                                              # first: it answers Ctrl-C in the slow imports

from tqdm import tqdm

import data
import models

TIMEOUT, TRIES, PAUSE = 30, 5, 1                             # seconds; without progress; first seconds
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG}
MAX_MEMBER = 1 << 14                                         # bytes of a one-sequence file in a zip
HUB = "https://huggingface.co"
ALGORITHM = {0: "", 32: "md5", 64: "sha256"}                 # by the length of a checksum
CITATIONS = {
    "GUE": "Zhou et al., DNABERT-2, 2023", "DeepSTARR": "de Almeida et al., DeepSTARR, Nature Genetics, 2022",
    "GenomicBenchmarks": "Gresova et al., Genomic benchmarks, BMC Genomic Data, 2023",
    "MTcDNA": "Ensembl; the task: Yu et al., FinDNA", "few-shot": "Roy et al., GeneMask, 2023; CM-GEMS"}
OTHERS = {                                                   # what is not a benchmark set, as in Source
    "hg38": ("free (UCSC)", "UCSC Genome Browser; Genome Reference Consortium",
             "python randommask.py --data_dir {}"),
    "sacCer3": ("free (UCSC)", "Saccharomyces Genome Database, R64",
                "python randommask.py --genome {}/sacCer3.fa.gz"),
    "dnabert6": ("Apache-2.0", "Ji et al., DNABERT, 2021",
                 "python finetune.py --task emp --init hf:{}/DNA_bert_6")}
TASKS_OF = {"gue": data.GROUPS["gue28"], "gb": [*data.GROUPS["gb8"], "gb/drosophila_enhancers_stark"]}
TASKS_OF |= data.GROUPS

# path: where the download lands, below data_dir; size: bytes, about; rows: {file below data_dir: published
# rows, or None}, the path itself or the tables made of a zip; digest: md5, sha256 or "" (unknown)
File = namedtuple("File", "path urls size rows digest")
Source = namedtuple("Source", "files licence citation check")                  # check: the next command


def source_name(task):
    """Returns the source of a benchmark set: DeepSTARR and MTcDNA are one download each."""
    return task.suite.lower() if task.suite in ("DeepSTARR", "MTcDNA") else task.name


def zip_task(path):
    """Returns the task whose set is in a zip of GenomicBenchmarks."""
    return data.TASKS["gb/" + os.path.basename(path).removesuffix("_v0.zip")]


def read_sources():
    """Reads tools/downloads.tsv: {name: Source}."""
    tasks, sources = {source_name(task): task for task in data.TASKS.values()}, {}
    with open(os.path.join(os.path.dirname(__file__), "downloads.tsv")) as f:
        for row in csv.DictReader(f, delimiter="\t"):
            name, path = row["source"], row["path"]
            if name not in sources and name in tasks:
                check = f"python -m tools.report {tasks[name].name} --data_dir {{}}"
                sources[name] = Source([], tasks[name].licence, CITATIONS[tasks[name].suite], check)
            elif name not in sources:
                sources[name] = Source([], *OTHERS[name])
            rows = {path: int(row["rows"]) if row["rows"] else None}
            if path.endswith(".zip"):
                rows = {f"{zip_task(path).folder}/{split}.csv": n for split, n in zip_task(path).rows.items()}
            file = File(path, row["urls"].split(), int(row["bytes"]), rows, row["checksum"])
            sources[name].files.append(file)
    return sources


SOURCES = read_sources()


def source_names(args):
    """Turns names of sources, groups and tasks into names of sources, each once."""
    found = []
    for name in args:
        tasks = [data.TASKS[task] for task in TASKS_OF.get(name, [name]) if task in data.TASKS]
        names = [name] if name in SOURCES else [source_name(task) for task in tasks]
        if not names or not set(names) <= set(SOURCES):
            raise ValueError(f"{data.quoted(name)} is unknown; use {' '.join([*SOURCES, *TASKS_OF])}")
        found += names
    return list(dict.fromkeys(found))


def mirrored(urls):
    """Returns these urls, those of huggingface.co at the mirror HF_ENDPOINT if it is set."""
    return [url.replace(HUB, os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB) for url in urls]


def check_url(url):
    """Raises ValueError unless the url is https (or http on this machine, for tests)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) != ("http", "127.0.0.1"):
        raise ValueError(f"{data.quoted(url)}: not https, refused")
    return url


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return super().redirect_request(req, fp, code, msg, headers, check_url(newurl))


def size_of(path):
    """Returns the bytes of a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(url, path, cap):
    """Makes one request: appends to path, or starts anew where the server has another file by now.
    path.from keeps the url and the server's tag; more than cap bytes are refused. ValueError: give up."""
    have, old_tag = size_of(path), None
    request = urllib.request.Request(url, headers={"User-Agent": "nanoDNA download.py"})
    if have and os.path.exists(path + ".from"):
        with open(path + ".from", opener=training.no_links) as f, contextlib.suppress(ValueError):
            old_tag = json.load(f).get(url)
    if old_tag:
        request.headers |= {"Range": f"bytes={have}-", "If-range": old_tag}
    with urllib.request.build_opener(HttpsOnly).open(request, timeout=TIMEOUT) as reply:
        header, resumed = reply.headers.get, reply.status == 206
        tag = header("ETag") or header("Last-Modified")
        if resumed and (tag != old_tag or not header("Content-Range", "").startswith(f"bytes {have}-")):
            os.unlink(path)
            raise ConnectionError("another file than before")
        if reply.status not in (200, 206) or header("Content-Encoding", "identity") != "identity":
            encoding = data.quoted(header("Content-Encoding"))
            raise ValueError(f"HTTP {reply.status}, encoding {encoding}: not the plain file")
        have = have if resumed else 0
        total = have + int(header("Content-Length")) if header("Content-Length") else None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab" if resumed else "wb", opener=training.no_links) as f, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            with training.create(path + ".from") as note:         # after the old bytes are gone
                json.dump({url: tag}, note)
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
    """Asks a url until the file is whole, or TRIES times without progress; ValueError says why it failed."""
    host, tries, best = urllib.parse.urlsplit(check_url(url)).netloc, 0, 0
    if host in unreachable:
        raise ValueError("no answer before")
    while tries < TRIES:
        try:
            return receive(url, path, cap)
        except urllib.error.HTTPError as e:
            reason = training.plain(f"HTTP {e.code} {e.reason}")
            if e.code == 416:                                # nothing after what we have: another file
                os.unlink(path)
            elif e.code < 500 and e.code not in (408, 429):
                raise ValueError(reason) from None
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in DISK_ERRORS:
                raise OSError(f"cannot write {path}: {e.strerror}; make room, then run it again") from None
            reason = training.plain(str(getattr(e, "reason", e)) or repr(e))
        tries = 1 if size_of(path) > best else tries + 1
        best = max(size_of(path), best)
        print(f"  {host}: {reason}; try {tries} of {TRIES} without progress", flush=True)
        if tries < TRIES:
            time.sleep(PAUSE * 2 ** (tries - 1))
    if not best:
        unreachable.add(host)
    raise ValueError(f"{reason} ({TRIES} tries)")


def count_records(path):
    """Counts the rows of a table, records of a FASTA or tensors of weights, by reading all of it strictly."""
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


def check_kind(path):
    """Raises ValueError for what servers send in place of data."""
    with open(path, "rb") as f:
        head = f.read(512).lstrip()
    kinds = ((not head, "empty"), (head[:1] == b"<", "an HTML or XML page"),
             (head.startswith(b"version https://git-lfs"), "a git-LFS pointer"),
             (path.endswith(".gz") and head[:2] != b"\x1f\x8b", "not gzip"),
             (path.endswith(".zip") and head[:2] != b"PK", "not a zip archive"))
    for is_so, what in kinds:
        if is_so:
            raise ValueError(f"{what}, not the data")


def verify(path, digest, rows):
    """Returns the manifest's entry of a sound file; ValueError: why it is not sound.
    Sound: by its published digest; without one, by reading it to the end. The manifest proves nothing."""
    check_kind(path)
    sha256, how = data.file_digest(path), ALGORITHM[len(digest)]
    if digest and (found := data.file_digest(path, None, how)) != digest:
        raise ValueError(f"{how} {found}, but the published file has {digest}")
    if not digest:
        n, how = count_records(path), "rows" if rows else "read to its end, no published checksum or rows"
        if rows not in (None, n):
            raise ValueError(f"{n:,} rows, but the published file has {rows:,}")
        rows = n
    return {"sha256": sha256, "bytes": os.path.getsize(path), "rows": rows, "verified": how}


def unpack(archive, tables, classes):
    """Turns a zip of one-sequence files .../SPLIT/CLASS/NAME.txt into tables, ordered by class and name.
    Members are read, never written under their names. tables: {path of SPLIT.csv: its rows}."""
    try:
        with zipfile.ZipFile(archive) as z:
            members = sorted(z.infolist(), key=lambda member: member.filename)
            for member in members:
                parts = member.filename.split("/")
                if ".." in parts or not parts[0] or "\\" in member.filename:
                    raise ValueError(f"member {data.quoted(member.filename)} leaves its folder")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile("compression method not supported")
            for path, n in tables.items():
                split = os.path.basename(path).removesuffix(".csv")
                found = []
                for label, name in enumerate(classes):
                    pattern = re.compile(f"(.*/)?{split}/{name}/[^/]+[.]txt")
                    found += [(label, member) for member in members if pattern.fullmatch(member.filename)]
                if len(found) != n or any(member.file_size > MAX_MEMBER for _, member in found):
                    raise ValueError(f"{len(found):,} sequences of {split} (or too long); published {n:,}")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with training.create(path) as f:
                    f.write("sequence,label\n")
                    for label, member in found:              # z.read would inflate it beyond its stated size
                        with z.open(member) as text:
                            f.write(f"{text.read(MAX_MEMBER).decode().strip()},{label}\n")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError) as e:
        raise ValueError(f"damaged zip archive ({data.quoted(str(e))})") from None


def verify_download(file, partial):
    """Verifies a finished download, unpacked where it is an archive: {path: the manifest's entry}."""
    landed = os.path.join(partial, file.path)
    if file.path not in file.rows:
        check_kind(landed)
        tables = {os.path.join(partial, path): n for path, n in file.rows.items()}
        unpack(landed, tables, zip_task(file.path).classes)
    return {path: verify(os.path.join(partial, path), file.digest, n) for path, n in file.rows.items()}


def download(file, data_dir, unreachable):
    """Puts a file's verified data in place, from what lies whole in partial or from its urls in order.
    Returns the manifest's entries by path. ValueError: what each url gave instead."""
    partial, reasons, entries, url = os.path.join(data_dir, "partial"), [], {}, None
    landed = os.path.join(partial, file.path)
    if os.path.exists(landed):                               # put there by hand, or killed at the last moment
        with contextlib.suppress(ValueError):
            entries = verify_download(file, partial)
    for url in [] if entries else mirrored(file.urls):
        try:
            fetch(url, landed, 2 * file.size + 1e6, unreachable)
            try:
                entries = verify_download(file, partial)
                break
            except ValueError:
                remove(landed)                               # the next try must not resume it
                raise
        except ValueError as e:
            reasons.append(f"{urllib.parse.urlsplit(url).netloc}: {e}")
    if not entries:
        raise ValueError("; ".join(reasons))
    for path in entries:
        os.makedirs(os.path.dirname(os.path.join(data_dir, path)), exist_ok=True)
        os.replace(os.path.join(partial, path), os.path.join(data_dir, path))
    remove(landed)
    today = datetime.date.today().isoformat()
    return {path: {"url": url, "date": today} | entry for path, entry in entries.items()}


def remove(landed):
    """Removes a download with what belongs to it, and its folders in partial where they are empty."""
    for path in (landed, landed + ".from"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.removedirs(os.path.dirname(landed))


def present(file, data_dir, manifest):
    """Returns the manifest's entries of a file whose data are there and sound; {} where some are missing."""
    places = {path: data.find(data_dir, path) for path in file.rows}
    if not all(places.values()):
        return {}
    entries = {}
    for path, place in places.items():
        digest = file.digest if place == os.path.join(data_dir, path) else ""  # not of a .gz made by the user
        old = manifest.get(path, {})
        try:
            entry = verify(place, digest, file.rows[path])
        except ValueError as e:
            raise ValueError(f"{place} is there, but {e}; move it away") from None
        same = old.get("sha256") == entry["sha256"]          # else it does not come from there
        if old and not same and not digest:
            print(f"{place}: not the file that manifest.json lists", flush=True)
        entries[path] = {name: old.get(name) if same else None for name in ("url", "date")} | entry
    return entries


def print_recipe(name, files, data_dir):
    """Prints how to get files by hand."""
    shell_dir = shlex.quote(data_dir)
    print(f"\n{name} by hand: on a machine with internet, in this folder (or copy {shell_dir} here later)")
    for file in files:
        is_plain = file.path in file.rows
        place = shlex.quote(os.path.join(data_dir, "" if is_plain else "partial", file.path))
        lines = [f"curl -fL --create-dirs -o {place} {shlex.quote(url)}" for url in mirrored(file.urls)]
        print("  " + "\n  # or: ".join(lines))
        if not is_plain:
            folder = zip_task(file.path).name.removeprefix("gb/")
            print(f"  python -m tools.download {name} --data_dir {shell_dir}   # unpacks it, offline\n"
                  f"  # or: git clone https://github.com/ML-Bioinfo-CEITEC/genomic_benchmarks; copy its\n"
                  f"  # datasets/{folder} into {shell_dir}/GenomicBenchmarks/coordinates;\n"
                  f"  # use --fasta GENOME.fa")
    check = SOURCES[name].check.format(shell_dir)
    print(f"  python -m tools.download {name} --check --data_dir {shell_dir} && {check}", flush=True)


def open_data_dir(data_dir, names):
    """Locks data_dir/partial; ValueError where another download works there or the disk has no room."""
    files = [file for name in names for file in SOURCES[name].files
             if not all(data.find(data_dir, path) for path in file.rows)]
    need = sum(file.size * (1 if file.path in file.rows else 2) for file in files)         # 2: zip and tables
    partial = os.path.join(data_dir, "partial")
    if os.path.islink(partial) and os.lstat(partial).st_uid not in (0, os.getuid()):
        raise ValueError(f"{partial}: a link made by another user; remove it, or use another --data_dir")
    try:
        os.makedirs(partial, exist_ok=True)
        lock = open(os.path.join(partial, "lock"), "a", opener=training.no_links)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileExistsError:                                  # a link in place of the lock
        raise
    except BlockingIOError:
        raise ValueError(f"{lock.name}: another download is at work there; wait for it") from None
    except OSError:                                          # read-only, but all may be there; or no locks
        lock = None
    free = shutil.disk_usage(data_dir).free if os.path.isdir(data_dir) else need
    if free < need:
        raise ValueError(f"{data_dir}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed; make room, or "
                         f"use another --data_dir")
    return lock


def get(names, data_dir, only_check):
    """Verifies the files of these sources and, unless only_check, gets those that are missing.
    ValueError, after the commands to get them by hand, where some are not sound."""
    manifest_path, manifest, failed, unreachable = os.path.join(data_dir, "manifest.json"), {}, {}, set()
    if os.path.exists(manifest_path):
        try:
            with open(manifest_path) as f:
                manifest = {path: dict(entry) for path, entry in json.load(f).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{manifest_path}: damaged; remove it, and run this again") from None
    for source, file in [(name, file) for name in names for file in SOURCES[name].files]:
        try:
            entries = present(file, data_dir, manifest)
            if not entries and only_check:
                raise ValueError("it is not there")
            entries = entries or download(file, data_dir, unreachable)
        except ValueError as e:
            print(f"{source}: {file.path}: {e}", flush=True)
            failed.setdefault(source, []).append(file)
            continue
        for path, entry in entries.items():
            print(f"{source}: {path}: sound ({entry['verified']}), {entry['bytes']:,} bytes", flush=True)
        if not only_check and manifest | entries != manifest:
            manifest |= entries
            with data.new_path(manifest_path, replace=True) as f:
                f.write(json.dumps(manifest, indent=1).encode())
    for name, files in failed.items():
        print_recipe(name, files, data_dir)
    if failed:
        raise ValueError(f"{sum(map(len, failed.values()))} files not sound ({', '.join(failed)}); run the "
                         f"same command again, or get them by hand as shown above")


def print_sources():
    """Prints a line per source."""
    print("name | size | verified by | licence as stated | cite")
    for name, source in SOURCES.items():
        kinds = set()
        for file in source.files:
            kinds.add(ALGORITHM[len(file.digest)] or ("rows" if any(file.rows.values()) else "unconfirmed"))
        size = sum(file.size for file in source.files) / 1e6
        print(f"{name} | {size:,.1f} MB | {', '.join(sorted(kinds))} | {source.licence} | {source.citation}")
    print(f"groups: {' '.join(TASKS_OF)}")


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    parser.add_argument("names", nargs="*", help="sources or groups (none: list them)")
    parser.add_argument("--data_dir", type=training.folder_name, default="data",
                        help="where the files go (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only verify: no network, nothing written")
    args = parser.parse_args()
    with training.user_errors():
        names = source_names(args.names)
        if not names:
            if args.check:
                raise ValueError("--check: name what to verify: sources or groups")
            training.outlive_streams()                       # ... | head
            print_sources()
            raise SystemExit
        lock = None if args.check else open_data_dir(args.data_dir, names)
        get(names, args.data_dir, args.check)
