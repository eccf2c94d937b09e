# Experiment D of results/PLAN.md, after A. Run it in the repository's folder: bash results/martinek.sh
# It needs data/constructed_human_or_worm and data/GenomicBenchmarks. Run it again to continue.
set -e
export OMP_NUM_THREADS=1
mkdir -p out/martinek

python - << 'END'                               # rows drawn from the tables, class by class; a table of tasks
import gzip
import numpy as np

def rows(path):
    with gzip.open(path, "rt") as f:
        return np.array([line.strip().replace("\t", ",").split(",") for line in f][1:])

def write(name, part):
    with open(f"out/martinek/{name}.csv", "w") as f:
        f.writelines(["sequence,label\n", *(f"{sequence},{label}\n" for sequence, label in part)])

def draw(part, n):                              # n rows, half of each class
    order = np.random.default_rng(0).permutation(len(part))
    return part[np.concatenate([[i for i in order if part[i, 1] == label][:n // 2] for label in "01"])]

def shuffled(part):
    return part[np.random.default_rng(0).permutation(len(part))]

worm, gb = "data/constructed_human_or_worm", "data/GenomicBenchmarks"
train, test = rows(f"{worm}/train.csv.gz"), rows(f"{worm}/test.csv.gz")
cohn = shuffled(rows(f"{gb}/human_enhancers_cohn/test.csv.gz"))
ocr = shuffled(rows(f"{gb}/human_ocr_ensembl/train_subset1000.tsv.gz"))
tables = {"few": [], "all": []}                 # the larger ones last
for name, train, test, sizes in (("worm", train, test, (100, 1000, len(train))),
                                 ("cohn", cohn[1390:], cohn[:1390], (100, 1000, len(cohn) - 1390)),
                                 ("ocr", ocr[300:], ocr[:300], (100, 700))):
    write(f"{name}_test", test)
    for n in sizes:
        write(f"{name}_{n}", draw(train, n) if n < len(train) else train)
        tables["few" if n <= 1000 else "all"].append(
            f"{name}/{n}\t{name}_{n}.csv {name}_test.csv\tf1_binary\tmartinek\n")
for name, lines in tables.items():
    with open(f"out/martinek/{name}.tsv", "w") as f:
        f.writelines(["name\tfiles\tmetric\tprotocol\n", *lines])
END

evaluate() {                                    # TABLE INIT SEED FLAGS
    tasks=out/martinek/$1.tsv; init=$2; seed=$3; shift 3
    python finetune.py --tasks $tasks --init $init --seed $seed --seeds 1 --out out/martinek/scores "$@"
}
for table in few all; do
    evaluate $table kmer 41
    for seed in 41 42 43 44 45; do
        evaluate $table penguinn $seed
        for init in out/randommask/dnabert/$seed/last.pt random:out/randommask/dnabert/$seed/last.pt; do
            evaluate $table $init $seed --stride 4 --lr 1e-3
        done
    done
done
