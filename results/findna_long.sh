# Experiment C, long windows, of results/PLAN.md. Run it in the repository's folder: bash results/findna_long.sh
# It needs data/human_regions.fa.gz and data/GUE. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh

pretrain() {                                    # ARM SEED FLAGS
    arm=$1; seed=$2; shift 2
    pretrain_run findna.py 3000 out/findna_long/$arm/$seed --seed $seed \
        --genome data/human_regions.fa.gz --cache out/findna_long/cache \
        --length 1000 --n_layer 1 --track_size 5 --hidden 96 --lr 5e-3 --batch_size 4 --micro_batch_size 4 \
        --log_every 500 --eval_every 1250 "$@"
}

probe() {                                       # INIT SEED FLAGS
    init=$1; seed=$2; shift 2
    python finetune.py --init $init --mode probe --seed $seed --seeds 1 --out out/findna_long/scores "$@" --task \
        tf_m/0 tf_m/1 tf_h/2 tf_h/4 cpd/tata cpd/all pd/all emp/H3 emp/H3K36me3 ssp/reconstructed
}

probe kmer 51
for seed in 51 52 53 54 55; do
    pretrain findna $seed
    pretrain mnm $seed --objective mnm
    probe out/findna_long/findna/$seed/last.pt $seed --eval_network teacher
    probe out/findna_long/mnm/$seed/last.pt $seed
    probe random:out/findna_long/findna/$seed/last.pt $seed
done
