"""download.py against a server on this machine: every source in its real layout, faults, resume, command."""
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import data
from tools import download
import harness
import models
from test_benchmarks import dna, pairs


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.replies[path], a list of dicts that are used up but for the last: body, status, headers,
    etag, ranges (default True), cut (bytes sent of those announced), stall and pause (seconds), length
    (False: none announced), careless (a tag that is taken for the file's)."""

    def do_GET(self):
        replies = self.server.replies.get(self.path.split("?")[0], [{"status": 404}])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.server.requests.append((self.path, dict(self.headers)))
        body, status, start = reply.get("body", b"no"), reply.get("status", 200), 0
        etag = reply.get("etag", '"1"')
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        known = self.headers.get("If-Range") in (etag, reply.get("careless"))
        if asked and reply.get("ranges", True) and known:
            start, status = int(asked[1]), 206
            if start >= len(body):
                status, body, start = 416, b"", 0
        self.send_response(status, reply.get("reason"))
        for name, value in {"ETag": etag, **reply.get("headers", {})}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if reply.get("length", True):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        part = body[start:reply.get("cut", len(body))]
        try:
            for at in range(0, len(part), 1 << 10):
                self.wfile.write(part[at:at + (1 << 10)])
                time.sleep(reply.get("pause", 0))
            time.sleep(reply.get("stall", 0))
        except OSError:                                      # the client has gone
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.002)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.replies, server.requests = True, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(names, folder, only_check=False):
    names = download.source_names(names)
    lock = None if only_check else download.open_data_dir(str(folder), names)
    download.get(names, str(folder), only_check)
    return lock


def csv(n, n_classes=2, width=20, seed=0, head="sequence,label\n"):
    return (head + "".join(f"{s},{i % n_classes}\n" for i, s in enumerate(dna(n, width, seed)))).encode()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return file.getvalue()


def altered(members, at, value):
    """A zip in whose headers, of all members, the bytes at `at` are others: 6 flags, 8 method, 22 size."""
    raw = bytearray(zipped(members))
    for mark, start in ((b"PK\3\4", at), (b"PK\1\2", at + 2)):
        for found in re.finditer(re.escape(mark), bytes(raw)):
            raw[found.start() + start:found.start() + start + len(value)] = value
    return bytes(raw)


def bert_folder(path):
    """A tiny DNABERT in the released layout: old-style pickle weights."""
    models.save_hf(models.Bert(models.BertConfig(4 ** 3 + 5, 20, 1, 2, 8, 32, 0.0)), str(path))
    weights, file = safetensors.torch.load_file(path / "model.safetensors"), io.BytesIO()
    torch.save(weights, file)
    return {"config.json": (path / "config.json").read_bytes(), "pytorch_model.bin": file.getvalue()}


def made_file(file, seed, tmp_path):
    """Bytes in the real layout of a file of SOURCES, and the file with their size, digest and rows."""
    name, n, rows = os.path.basename(file.path), 6, dict(file.rows)
    task = next((task for task in data.TASKS.values() if re.match(f"{task.folder}[/_]", file.path)), None)
    classes = len(task.classes) if task else 2
    if name.endswith(".zip"):
        members = {f"{task.name[3:]}/{split}/{of}/{i}.txt": text for split in ("train", "test")
                   for c, of in enumerate(task.classes) for i, text in enumerate(dna(3, 20, c + len(split)))}
        body, rows = zipped(dict(reversed(members.items()))), {path: 3 * classes for path in rows}
    elif name.endswith(".tsv"):
        n = rows[file.path]
        lines = [" ".join(s[i:i + 6] for i in range(15)) + f"\t{c % classes}"
                 for c, s in enumerate(dna(n, 20, seed))]
        body = "\n".join(["sequence\tlabel", *lines]).encode()
    elif name.endswith(".csv"):
        body, rows = csv(n := 3 * classes, classes, seed=seed), {file.path: n}
    elif name.endswith((".fa", ".fa.gz")):
        contigs = {"hg38.fa.gz": [*data.HG38_CONTIGS, "chrUn_1"]}.get(name, range(17 if "sac" in name else 6))
        width = 6000 if "cdna" in name else 249
        body = "".join(f">{c}\n{s}\n" for c, s in zip(contigs, dna(len(contigs), width, seed))).encode()
        body = gzip.compress(body) if name.endswith("gz") else body
    elif "activity" in name:
        body = ("ID\tDev_log2_enrichment\tHk_log2_enrichment\n" + "a\t0.5\t-1.25\n" * n).encode()
    else:
        body = bert_folder(tmp_path / f"bert{seed}")[name]
    digest = file.digest and hashlib.new(download.ALGORITHM[len(file.digest)], body).hexdigest()
    return body, file._replace(size=len(body), digest=digest, rows=rows)


def local(source, server, tmp_path):
    """A source whose files are made ones, at the paths of their real urls on the server."""
    files = []
    for seed, file in enumerate(source.files):
        assert all(url.startswith("https://") for url in file.urls)
        body, file = made_file(file, seed, tmp_path)
        paths = [url.removeprefix("https://").split("?")[0] for url in file.urls]
        server.replies[f"/{paths[-1]}"] = [{"body": body}]   # 404 from those before
        files.append(file._replace(urls=[url.replace("https://", server.url) for url in file.urls]))
    return source._replace(files=files)


@pytest.mark.parametrize("name", download.SOURCES)
def test_every_source(name, server, tmp_path, monkeypatch, capsys):
    source, folder = local(download.SOURCES[name], server, tmp_path), tmp_path / "data"
    monkeypatch.setitem(download.SOURCES, name, source)
    run([name], folder)
    n, manifest = len(server.requests), json.loads((folder / "manifest.json").read_text())
    places = {path for file in source.files for path in file.rows}
    assert places == set(manifest) == set(harness.contents(folder)) - {"manifest.json", "partial/lock"}
    for file in source.files:
        for path in file.rows:
            entry, body = manifest[path], (folder / path).read_bytes()
            assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(body).hexdigest(), len(body))
            assert entry["url"] == file.urls[-1] and entry["rows"] == (file.rows[path] or entry["rows"])
            assert entry["date"] > "2025" and entry["verified"] == (
                download.ALGORITHM[len(file.digest)] or entry["verified"])
    before = harness.contents(folder)
    run([name], folder)
    run([name], folder, only_check=True)
    assert len(server.requests) == n and harness.contents(folder) == before
    assert capsys.readouterr().out.count(": sound (") == 3 * len(places)
    os.unlink(folder / "manifest.json")                      # as if copied there by hand
    run([name], folder, only_check=True)
    assert len(server.requests) == n

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if name == "hg38":
        assert list(data.open_genome(["hg38"], folder).contigs) == data.HG38_CONTIGS
    elif name == "sacCer3":
        assert len(data.Genome(folder / "sacCer3.fa.gz").contigs) == 17
    elif name == "dnabert6":
        assert models.load_hf(str(folder / "DNA_bert_6")).config.k == 3
    else:
        for task in [of for of in data.TASKS if download.source_name(data.TASKS[of]) == name]:
            splits = data.read_task(task, folder)
            assert splits["train"] and splits["test"]
        if name.startswith("gb/"):
            made = [(text, c) for c in range(len(data.TASKS[name].classes)) for text in dna(3, 20, c + 5)]
            assert pairs(splits["train"]) == made
        if name == "emp/H3":
            assert pairs(splits["dev"]) == list(zip(dna(6, 20, 2), [0, 1] * 3))


def moved(url):
    return {"status": 302, "headers": {"Location": url}}


BODY = csv(400)
CUT = {"body": BODY, "cut": 9000}
PART = BODY[:9000]
GOOD = {"body": BODY}
ENDS_WELL = {                                                # name: replies of the first url, requests, Range
    "good": ([GOOD], 1, ""), "resumed": ([CUT, GOOD], 2, "bytes=9000-"), "no ranges": (
        [CUT, {"body": BODY, "ranges": False}], 2, "bytes=9000-"),
    "changed meanwhile": ([{"body": csv(401, seed=3), "cut": 9000, "etag": '"0"'}, GOOD], 2, "bytes=9000-"),
    "careless server": ([{"body": csv(401, seed=3), "cut": 9000, "etag": '"0"'},
                         GOOD | {"careless": '"0"'}, GOOD], 3, "bytes=9000-"),
    "no tag": ([CUT | {"headers": {"ETag": ""}, "etag": ""}, GOOD], 2, ""),
    "stalled": ([{"body": BODY, "cut": 9000, "stall": 2}, GOOD], 2, "bytes=9000-"),
    "many cuts": ([BODY and CUT | {"cut": n} for n in range(1000, 9000, 1000)] + [GOOD], 9, "bytes=8000-"),
    "busy": ([{"status": 503}] * 3 + [{"status": 429}, GOOD], 5, ""),
    "no length": ([GOOD | {"length": False}], 1, ""),
    "negative length": ([GOOD | {"length": False, "headers": {"Content-Length": "-9"}}], 1, ""),
    "redirected": ([moved("/mirror")], 2, ""),
    "longer than there": ([{"body": BODY + BODY[-22:], "cut": len(BODY) + 5}, GOOD, GOOD], 3,
                          f"bytes={len(BODY) + 5}-"),
    "missing": ([{"status": 404}], 2, ""), "wrong bytes": ([{"body": BODY[:-1] + b" "}], 2, ""),
    "always cut": ([CUT], 6, "bytes=9000-"), "HTML": ([{"body": b"\n<!DOCTYPE html><html>"}], 2, "")}


@pytest.mark.fault("downloads")
@pytest.mark.parametrize("case", ENDS_WELL)
def test_ends_well(case, server, tmp_path, monkeypatch):
    replies, n, asked = ENDS_WELL[case]
    server.replies |= {"/first": [*replies], "/mirror": [GOOD]}
    rows, digest = {"GUE/a.csv": 400}, hashlib.sha256(BODY).hexdigest()
    file = download.File("GUE/a.csv", [server.url + "first", server.url + "mirror"], len(BODY), rows, digest)
    monkeypatch.setitem(download.SOURCES, "a", download.Source([file], "none", "none", "check {}"))
    run(["a"], tmp_path)
    assert (tmp_path / "GUE/a.csv").read_bytes() == BODY
    assert set(harness.contents(tmp_path)) == {"GUE/a.csv", "manifest.json", "partial/lock"}
    assert (len(server.requests), max(h.get("Range", "") for _, h in server.requests)) == (n, asked)
    came_from = json.loads((tmp_path / "manifest.json").read_text())["GUE/a.csv"]["url"]
    assert came_from.endswith("mirror") == (case in ("missing", "wrong bytes", "always cut", "HTML"))


FASTA = gzip.compress(b">a\n" + b"ACGT" * 5000)
ZIP = {f"x/{split}/{of}/1.txt": "ACGTACGT" for split in ("train", "test") for of in ("negative", "positive")}
COHN = "GenomicBenchmarks/human_enhancers_cohn"
LINK = zipfile.ZipInfo("x/train/negative/1.txt")
LINK.external_attr = 0o120777 << 16
REFUSED = {                                                  # name: place, replies, what the message says
    "truncated": ("a.csv", [CUT], "cut after 9,000 of"),
    "stalled": ("a.csv", [CUT | {"stall": 9}], "timed out"),
    "dripping": ("a.csv", [{"body": BODY, "cut": 0, "stall": 9}], "timed out"),
    "one row lost": ("a.csv", [{"body": csv(399)}], "399 rows, but the published file has 400"),
    "not DNA": ("a.csv", [{"body": BODY + b"ACGX,1\n"}], "not a DNA letter"),
    "half a row": ("a.csv", [{"body": BODY[:-30]}], "fields|no label|rows|label"),
    "HTML": ("a.csv", [{"body": b" <!DOCTYPE html>quota"}], "HTML"),
    "empty": ("a.csv", [{"body": b""}], "empty"),
    "HTML for gzip": ("a.fa.gz", [{"body": b"<html>sign in"}], "HTML"),
    "LFS pointer": ("pytorch_model.bin", [{"body": b"version https://git-lfs.github.com/spec"}], "git-LFS"),
    "text for gzip": ("a.fa.gz", [{"body": b">a\nACGT\n"}], "not gzip"),
    "truncated gzip": ("a.fa.gz", [{"body": FASTA[:-9]}], "damaged gzip"),
    "damaged weights": ("pytorch_model.bin", [{"body": b"PK\3\4" + b"x" * 99}], "cannot be read"),
    "wrong hash": ("a.csv", [{"body": csv(400, seed=9)}], "sha256 .*, but the published file has"),
    "escapes in a reason": ("a.csv", [{"status": 404, "reason": "\x1b]0;x\x07" + "y" * 2000}], r"404 \\x1b"),
    "escapes in a header": ("a.csv", [GOOD | {"headers": {"Content-Encoding": "\x1b[2Jz"}}], r"'\\x1b\[2Jz'"),
    "escapes in a redirect": ("a.csv", [moved("file:///\x1bcx")], r"302.*\\x1b"),
    "no number for a length": (
        "a.csv", [GOOD | {"length": False, "headers": {"Content-Length": "x"}}], "'x'"),
    "no HTTP": ("a.csv", [{"status": 0, "reason": "\x1b[2J"}], r"\\x1b"),
    "missing": ("a.csv", [{"status": 404}], "HTTP 404"),
    "forbidden": ("a.csv", [{"status": 403}], "HTTP 403"),
    "broken server": ("a.csv", [{"status": 500}], r"HTTP 500.*\(5 tries\)"),
    "redirect to a file": ("a.csv", [moved("file:///etc/passwd")], "302.*not allowed"),
    "redirect to http": ("a.csv", [moved("http://example.invalid/")], "not https"),
    "redirect to ftp": ("a.csv", [moved("ftp://example.invalid/")], "not https"),
    "redirects for ever": ("a.csv", [moved("/first")], "infinite loop"),
    "too large": ("a.csv", [{"body": b"A" * 3_000_000}], "too large"),
    "without end": ("a.csv", [{"body": b"A" * 3_000_000, "length": False}], "too large"),
    "compressed": ("a.csv", [GOOD | {"headers": {"Content-Encoding": "gzip"}}], "not the plain file"),
    "zip with paths": (f"{COHN}_v0.zip", [{"body": zipped(ZIP | {"x/../negative/e.txt": "A"})}], "leaves"),
    "zip with roots": (f"{COHN}_v0.zip", [{"body": zipped(ZIP | {"/train/negative/e.txt": "A"})}], "leaves"),
    "zip with drives": (f"{COHN}_v0.zip", [{"body": zipped({f"C:\\{name}": x for name, x in ZIP.items()})}],
                        "leaves"),
    "zip with links": (f"{COHN}_v0.zip", [{"body": zipped(dict([*ZIP.items()][1:]) | {LINK: "/etc/passwd"})}],
                       "not a DNA letter"),
    "zip with a bomb": (f"{COHN}_v0.zip", [{"body": zipped(ZIP | {[*ZIP][0]: "A" * 99_999})}], "too long"),
    "zip with a password": (f"{COHN}_v0.zip", [{"body": altered(ZIP, 6, b"\1")}], "zip.*File <Zip"),
    "zip of another method": (f"{COHN}_v0.zip", [{"body": altered(ZIP, 8, b"c")}], "damaged zip.*not supp"),
    "zip with wrong sizes": (f"{COHN}_v0.zip", [{"body": altered(ZIP, 22, b"\5\0\0\0")}], "damaged zip.*CRC"),
    "zip with names of escapes": (f"{COHN}_v0.zip", [{"body": zipped(ZIP | {"\x1b[2J/../x.txt": "A"})}],
                                  r"'\\x1b.*leaves"),
    "tar": (f"{COHN}_v0.zip", [{"body": b"train/negative/1.txt".ljust(512, b"\0") + b"A"}], "not a zip"),
    "truncated zip": (f"{COHN}_v0.zip", [{"body": zipped(ZIP)[:-40]}], "damaged zip"),
    "zip without a class": (f"{COHN}_v0.zip", [{"body": zipped(dict([*ZIP.items()][1::2]))}],
                            "1 sequences of train.*published 2"),
    "damaged member": (f"{COHN}_v0.zip", [{"body": zipped(ZIP).replace(b"n/neg", b"n/nag", 1)}], "damaged"),
    "HTML for zip": (f"{COHN}_v0.zip", [{"body": b"<html>"}], "HTML")}


KINDS = [pytest.param(case, marks=pytest.mark.fault("hostile archives" if "zip" in case or case == "tar"
                                                    else "downloads")) for case in REFUSED]


@pytest.mark.parametrize("case", KINDS)
def test_refused(case, server, tmp_path, monkeypatch, capsys):
    path, replies, word = REFUSED[case]
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.replies["/first"] = [*replies]
    rows = {f"{COHN}/{split}.csv": 2 for split in ("train", "test")} if "zip" in path else {path: 400}
    digest = hashlib.sha256(BODY).hexdigest() if "hash" in case else ""
    file = download.File(path, [server.url + "first"], len(BODY), rows, digest)
    monkeypatch.setitem(download.SOURCES, "a", download.Source([file], "none", "none", "python report a {}"))
    folder = tmp_path / "data"
    with pytest.raises(ValueError, match="1 files not sound .a."):
        run(["a"], folder)
    out = capsys.readouterr().out
    assert re.search(f"^a: {re.escape(path)}: .*({word})", out, re.M), out
    place = folder / ("partial" if "zip" in path else "") / path
    assert out.count("curl ") == 1 and "\x1b" not in out
    for said in (f"curl -fL --create-dirs -o {place} {server.url}first", f"python report a {folder}",
                 f"python -m tools.download a --check --data_dir {folder}"):
        assert said in out
    left = {name for name in harness.contents(folder) if not name.startswith("partial/")}
    assert not left and not (tmp_path / "train").exists() and not list(tmp_path.glob("*.txt"))
    server.replies["/first"] = [GOOD if path == "a.csv" else {"body": gzip.compress(b"".join(
        b">%d\nACGT\n" % i for i in range(400))) if "gz" in path else zipped(ZIP)}]
    if ".bin" not in path:                                   # what is left in partial never stands in the way
        run(["a"], folder)
        assert all((folder / name).exists() for name in rows)


@pytest.mark.fault("hostile archives")
def test_a_zip_that_lies_takes_no_memory(tmp_path):
    """100 MB of A in each member, of which the headers say that it has 8 bytes."""
    (tmp_path / "a.zip").write_bytes(altered(dict.fromkeys(ZIP, "A" * 10 ** 8), 22, b"\x08\0\0\0"))
    tracemalloc.start()
    with pytest.raises(ValueError, match="CRC"):
        download.unpack(tmp_path / "a.zip", {str(tmp_path / "train.csv"): 2}, ("negative", "positive"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 ** 7


def one_file(server, monkeypatch, replies):
    server.replies["/first"] = replies
    file = download.File("a.csv", [server.url + "first"], len(BODY), {"a.csv": 400}, "")
    monkeypatch.setitem(download.SOURCES, "a", download.Source([file], "none", "none", "check"))


@pytest.mark.fault("downloads", n=2)
def test_full_disk(server, tmp_path, monkeypatch, survived):
    one_file(server, monkeypatch, [GOOD])
    free = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=len(BODY) - 1))
        with pytest.raises(ValueError, match="0.0 GB free, 0.0 GB needed; make room"):
            run(["a"], tmp_path)
    survived()
    real = open

    def full(path, mode="r", **kwargs):
        file = real(path, mode, **kwargs)
        if path.endswith("a.csv") and "b" in mode and "r" not in mode:
            file = real("/dev/full", mode, buffering=0)
        return file
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", full, raising=False)
        with pytest.raises(OSError, match="cannot write .*a.csv: No space left on device; make room"):
            run(["a"], tmp_path)
    assert not (tmp_path / "a.csv").exists()
    run(["a"], tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == BODY
    survived()


@pytest.mark.fault("downloads", n=1)
def test_offline(server, tmp_path, monkeypatch, capsys):
    files = [download.File(path, ["http://127.0.0.1:1/a"], 9, {path: 1}, "") for path in ("a.csv", "b.csv")]
    monkeypatch.setitem(download.SOURCES, "a", download.Source(files, "none", "none", "check"))
    with pytest.raises(ValueError, match="2 files not sound"):
        run(["a"], tmp_path)
    out = capsys.readouterr().out                            # a silent host is tried five times in all
    assert out.count("try ") == 5 and "b.csv: 127.0.0.1:1: no answer before" in out
    assert out.count("curl -fL") == 2 and set(harness.contents(tmp_path)) == {"partial/lock"}


def test_proxy(server, tmp_path, monkeypatch):
    one_file(server, monkeypatch, [GOOD])
    file = download.SOURCES["a"].files[0]._replace(urls=["http://127.0.0.1:1/a"])
    monkeypatch.setitem(download.SOURCES, "a", download.SOURCES["a"]._replace(files=[file]))
    monkeypatch.setenv("http_proxy", server.url)
    server.replies["http://127.0.0.1:1/a"] = [GOOD]
    run(["a"], tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == BODY


@pytest.mark.fault("downloads", n=2)
def test_killed_and_resumed(server, tmp_path, monkeypatch, survived):
    one_file(server, monkeypatch, [GOOD | {"pause": 0.05}, GOOD])
    process, part = harness.fork(lambda: run(["a"], tmp_path)), tmp_path / "partial/a.csv"
    while not part.exists() or part.stat().st_size < 2000:
        assert process.is_alive()
        time.sleep(0.003)
    with pytest.raises(ValueError, match="another download is at work"):
        run(["a"], tmp_path)
    survived()
    process.kill()
    process.join()
    assert "a.csv" not in harness.contents(tmp_path) and 2000 <= part.stat().st_size < len(BODY)
    n = part.stat().st_size
    run(["a"], tmp_path)
    assert server.requests[-1][1]["Range"] == f"bytes={n}-" and len(server.requests) == 2
    assert (tmp_path / "a.csv").read_bytes() == BODY and set(harness.contents(tmp_path)) == {
        "a.csv", "manifest.json", "partial/lock"}
    survived()


def test_files_that_are_there(server, tmp_path, monkeypatch, capsys):
    one_file(server, monkeypatch, [GOOD])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(BODY))  # another spelling, by hand
    run(["a"], tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["a.csv"]
    assert not server.requests and (entry["url"], entry["rows"]) == (None, 400)
    os.unlink(tmp_path / "a.csv.gz")
    (tmp_path / "a.csv").write_bytes(BODY[:-23])             # damaged since, or another's: never overwritten
    for only_check in (True, False):
        with pytest.raises(ValueError, match="1 files not sound"):
            run(["a"], tmp_path, only_check)
        assert "a.csv is there, but 399 rows" in (out := capsys.readouterr().out) and "move it away" in out
    assert (tmp_path / "a.csv").read_bytes() == BODY[:-23] and not server.requests
    os.unlink(tmp_path / "a.csv")
    with pytest.raises(ValueError):
        run(["a"], tmp_path, only_check=True)
    assert "not there" in capsys.readouterr().out and not server.requests
    (tmp_path / "partial/a.csv").write_bytes(BODY)           # killed between the last byte and the name
    run(["a"], tmp_path)
    assert not server.requests and (tmp_path / "a.csv").read_bytes() == BODY


ENTRY = {"url": "x", "date": "2020-01-01", "sha256": "0", "bytes": 1, "rows": 400, "verified": "md5"}
# manifests of strangers, for a table whose labels are flipped; SHA becomes its sha256
MANIFESTS = {f"without {name}": {name_: value for name_, value in ENTRY.items() if name_ != name}
             for name in ENTRY} | {
    "as found": ENTRY, "empty": {}, "edited": ENTRY | {"sha256": "SHA"}, "only that": {"sha256": "SHA"},
    "a claim": ENTRY | {"sha256": "SHA", "verified": "sha256"}, "no text": dict.fromkeys(ENTRY, 3),
    "nothing": dict.fromkeys(ENTRY), "lists": dict.fromkeys(ENTRY, [[]]),
    "escapes": dict.fromkeys(ENTRY, "\x1b[2J")}


@pytest.mark.fault("manifest of a stranger", n=2 * len(MANIFESTS))
def test_manifest_proves_nothing(server, tmp_path, monkeypatch, capsys, survived):
    """What is verified by rows says "rows"; a published digest wins over the manifest."""
    flipped = re.sub(b",([01])\n", lambda found: b",%d\n" % (1 - int(found[1])), BODY)
    (tmp_path / "a.csv").write_bytes(flipped)
    for digest in ("", hashlib.sha256(BODY).hexdigest()):
        file = download.File("a.csv", [], len(BODY), {"a.csv": 400}, digest)
        monkeypatch.setitem(download.SOURCES, "a", download.Source([file], "none", "none", "check {}"))
        for name, entry in MANIFESTS.items():
            entry = json.dumps({"a.csv": entry}).replace("SHA", hashlib.sha256(flipped).hexdigest())
            (tmp_path / "manifest.json").write_text(entry)
            with pytest.raises(ValueError) if digest else contextlib.nullcontext():
                run(["a"], tmp_path, only_check=True)
            out = capsys.readouterr().out
            assert ("the published file has" if digest else "a.csv: sound (rows), ") in out, name
            changed = not digest and "SHA" not in str(MANIFESTS[name]) and name != "empty"
            assert ("not the file that manifest.json lists" in out) == changed and "\x1b" not in out
            survived()


@pytest.mark.fault("planted link in the data folder", n=4)
def test_planted_links(server, tmp_path, monkeypatch, survived):
    """The file behind a link is left alone: another user may have made the link."""
    mine = tmp_path / "mine"
    for name in ("lock", "a.csv", "a.csv.from", "../manifest.json.tmp"):
        folder = tmp_path / name.strip("./")
        one_file(server, monkeypatch, [GOOD])
        mine.write_text("precious")
        (folder / "partial").mkdir(parents=True)
        os.symlink(mine, folder / "partial" / name)
        if name in ("lock", "a.csv"):
            with pytest.raises((OSError, ValueError), match="a link, not followed|not sound"):
                run(["a"], folder)
        else:
            run(["a"], folder)
        assert mine.read_text() == "precious"
        survived()


def test_command(server, tmp_path, monkeypatch):
    """The command itself: the hub's files from HF_ENDPOINT, published numbers of rows, exit codes."""
    for split, n in data.TASKS["cpd/tata"].rows.items():
        file, = (file for file in download.SOURCES["cpd/tata"].files if f"/{split}." in file.path)
        path = file.urls[1].removeprefix(download.HUB)
        server.replies[path] = [{"body": csv(n, width=70, seed=n)}]
    monkeypatch.setenv("HF_ENDPOINT", server.url)            # which ends with a slash
    result = harness.run(["cpd/tata", "--data_dir", tmp_path], script="tools.download")
    assert (result.code, result.err) == (0, ""), result
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("GUE/*/*/*"))] == [
        f"GUE/prom/prom_core_tata/{split}.csv" for split in ("dev", "test", "train")]
    assert harness.run(["cpd/tata", "--check", "--data_dir", tmp_path], script="tools.download").code == 0
    monkeypatch.setenv("HF_ENDPOINT", "ftp://example.invalid")
    result = harness.run(["cpd", "--data_dir", tmp_path], script="tools.download")
    assert "6 files not sound (cpd/all, cpd/notata)" in harness.refused(result)
    assert result.out.count("not https, refused") == 12 and result.out.count("curl -fL") == 12
    assert "is unknown; use hg38" in harness.refused(harness.run(["hg39"], script="tools.download"))
    result = harness.run([], script="tools.download")
    assert result.code == 0 and all(f"{name} | " in result.out for name in download.SOURCES)


def test_table():
    files = {file.path: file for source in download.SOURCES.values() for file in source.files}
    assert len(download.source_names(["gue"])) == 28 and len(download.source_names(["gb"])) == 9
    assert download.source_names(["eap", "deepstarr", "mtcdna/1024"]) == ["deepstarr", "mtcdna"]
    names = {*download.source_names([*download.TASKS_OF]), *download.OTHERS}
    assert names == set(download.SOURCES) and sum(path.startswith("GUE/") for path in files) == 84
    digests = [file.digest for file in files.values() if file.digest]
    assert len(digests) == 25 and all(re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", digest) for digest in digests)
    for task in data.TASKS.values():                         # the same row counts as in data.py
        for split, n in task.rows.items() if task.suite in ("GUE", "GenomicBenchmarks") else ():
            path = f"{task.folder}/{split}.csv"
            assert next(file.rows[path] for file in files.values() if path in file.rows) == n
    deepstarr = [files[f"DeepSTARR/Sequences_{name}.fa"] for name in ("Train", "Test", "Val")]
    assert [n for file in deepstarr for n in file.rows.values()] == [*data.TASKS["eap"].rows.values()]
    assert files["fewshot/Splice-40/500/train_splice40_500.tsv"].rows == {
        "fewshot/Splice-40/500/train_splice40_500.tsv": 15000}
    urls = [url for file in files.values() for url in file.urls]
    assert all(url.startswith("https://") and " " not in url for url in urls)


REAL = [(file, path) for source in download.SOURCES.values() for file in source.files
        if file.path.endswith(("csv", "tsv")) and "standin" not in file.path
        and (path := data.find(harness.SHARED / "data", file.path))]


@pytest.mark.skipif(not REAL, reason="no shared data")
def test_real_files_are_sound(tmp_path):
    """The published files that we have pass: rows, and checksums of the unpacked text."""
    n = 0
    for file, path in REAL:
        with data.opened(path) as f:
            (text := tmp_path / os.path.basename(file.path)).write_bytes(f.read())
        entry = download.verify(str(text), file.digest, *file.rows.values())
        n += entry["verified"] == "sha256"
        assert file.size / 2 < entry["bytes"] < 1.5 * file.size
    assert n >= 18


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("[1, 2]")])
def test_a_manifest_that_is_none_is_one_line(tmp_path, make):
    make(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json: damaged; remove it"):
        download.get(["emp/H3"], str(tmp_path), only_check=True)
