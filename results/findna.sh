# Experiment C of results/PLAN.md. Run it in the repository's folder: bash results/findna.sh
# It needs data/human_regions.fa.gz and data/GUE. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh
sets="tf_m/0 tf_m/1 tf_h/2 tf_h/4 cpd/tata cpd/all pd/all emp/H3 emp/H3K36me3 ssp/reconstructed"

pretrain() {                                    # ARM SEED FLAGS
    arm=$1; seed=$2; shift 2
    pretrain_run findna.py 6000 out/findna/$arm/$seed --seed $seed \
        --genome data/human_regions.fa.gz --cache out/findna/cache \
        --length 64 --n_layer 1 --track_size 6 --hidden 96 --lr 5e-3 --batch_size 32 --micro_batch_size 32 \
        --log_every 500 --eval_every 2500 "$@"
}

evaluate() {                                    # ARM SEED FLAGS
    init=out/findna/$1/$2/last.pt; seed=$2; shift 2
    python finetune.py --init ${random}$init --seed $seed --seeds 1 --out out/findna/scores "$@"
}
probe() { evaluate $1 $2 --mode probe --task $sets ${3:+--eval_network $3}; }
tune() { evaluate $1 $2 --task tf_m/0 cpd/tata --epochs 5 --lr 1e-3 ${3:+--eval_network $3}; }

python finetune.py --init kmer --mode probe --task $sets --seed 11 --seeds 1 --out out/findna/scores
for seed in 11 12 13 14 15; do
    pretrain findna $seed
    pretrain mnm $seed --objective mnm
    pretrain cl $seed --objective cl
    for network in teacher student; do probe findna $seed $network; done
    probe mnm $seed
    probe cl $seed teacher
    random=random: probe findna $seed
done
for seed in 11 12 13 14 15; do
    pretrain transformer $seed --backbone transformer --n_layer 2 --n_embd 48 --n_head 4
    probe transformer $seed teacher
    for views in M+none M+DIT MDT+DIT; do
        pretrain views_$views $seed --views $views
        probe views_$views $seed teacher
    done
done
for seed in 11 12 13 14 15; do
    tune findna $seed teacher
    tune mnm $seed
    random=random: tune findna $seed
done
