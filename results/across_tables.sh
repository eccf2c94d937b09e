# Experiment E of results/PLAN.md on the tables of D, after across.sh and martinek.sh. Run it in the repository's
# folder: bash results/across_tables.sh. Run it again to continue: finished runs are skipped.
set -e
export OMP_NUM_THREADS=1

evaluate() {                                    # TABLE FLAGS
    tasks=out/martinek/$1.tsv; shift
    python finetune.py --tasks $tasks --seeds 1 --out out/across_tables/scores "$@"
}
probe() { for table in few all; do evaluate $table --mode probe --init $1 --seed $2 ${3:+--eval_network $3}; done; }
tune() { evaluate few --lr 1e-3 --init $1 --seed $2 ${3:+--eval_network $3}; }

probe kmer 41
evaluate few --init kmer --seed 41
for seed in 41 42 43; do
    for arm in randommask cm_gems findna; do
        network=; [ $arm != findna ] || network=teacher
        for what in probe tune; do
            $what out/across/$arm/$seed/last.pt $seed $network
            $what random:out/across/$arm/$seed/last.pt $seed
        done
    done
done
