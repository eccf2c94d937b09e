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
        return np.array([line.strip().split(",") for line in f][1:])

def write(name, part):
    with open(f"out/martinek/{name}.csv", "w") as f:
        f.writelines(["sequence,label\n", *(f"{sequence},{label}\n" for sequence, label in part)])

def draw(part, n):                              # n rows, half of each class
    order = np.random.default_rng(0).permutation(len(part))
    return part[np.concatenate([[i for i in order if part[i, 1] == label][:n // 2] for label in "01"])]

worm, cohn = "data/constructed_human_or_worm", "data/GenomicBenchmarks/human_enhancers_cohn"
train, test = rows(f"{worm}/train.csv.gz"), rows(f"{worm}/test.csv.gz")
enhancers = rows(f"{cohn}/test.csv.gz")
enhancers = enhancers[np.random.default_rng(0).permutation(len(enhancers))]
lines = ["name\tfiles\tmetric\tprotocol\n"]
for name, train, test, sizes in (("worm", train, test, (100, 1000, len(train))),
                                 ("cohn", enhancers[1390:], enhancers[:1390], (100, 1000))):
    write(f"{name}_test", test)
    for n in sizes:
        write(f"{name}_{n}", draw(train, n))
        lines.append(f"{name}/{n}\t{name}_{n}.csv {name}_test.csv\tf1_binary\tmartinek\n")
with open("out/martinek/tasks.tsv", "w") as f:
    f.writelines(lines)
END

evaluate() {                                    # INIT SEED FLAGS
    init=$1; seed=$2; shift 2
    python finetune.py --tasks out/martinek/tasks.tsv --init $init --seed $seed --seeds 1 --out out/martinek/scores "$@"
}
evaluate kmer 21
for seed in 21 22 23; do
    evaluate penguinn $seed
    for init in out/randommask/dnabert/$seed/last.pt random:out/randommask/dnabert/$seed/last.pt; do
        evaluate $init $seed --stride 4 --lr 1e-3
    done
done
