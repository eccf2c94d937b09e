# Experiment A of results/PLAN.md. Run it in the repository's folder: bash results/randommask.sh
# It needs data/human_regions.fa.gz and data/GUE. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh
sets="tf_m/0 tf_m/1 tf_h/2 tf_h/4 cpd/tata pd/all emp/H3"

pretrain() {                                    # ARM SEED FLAGS
    arm=$1; seed=$2; shift 2
    pretrain_run randommask.py 2400 out/randommask/$arm/$seed --seed $seed \
        --genome data/human_regions.fa.gz --cache out/randommask/cache \
        --k 4 --block_size 34 --n_layer 2 --n_head 4 --n_embd 64 --dropout 0 --batch_size 128 \
        --micro_batch_size 128 --lr 5e-3 --warmup 120 --log_every 200 --eval_every 800 "$@"
}

evaluate() {                                    # ARM SEED FLAGS: with overlapping and non-overlapping tokens
    init=${random}out/randommask/$1/$2/last.pt; seed=$2; shift 2
    for stride in 1 4; do
        python finetune.py --init $init --stride $stride --seed $seed --seeds 1 --out out/randommask/scores "$@"
    done
}

python finetune.py --init kmer --mode probe --task $sets --seed 21 --seeds 1 --out out/randommask/scores
for seed in 21 22 23 41 42 43; do
    pretrain randommask $seed
    pretrain dnabert $seed --mask dnabert
    pretrain single $seed --mask single --stride 4
    for arm in randommask dnabert single; do evaluate $arm $seed --mode probe --task $sets; done
    random=random: evaluate dnabert $seed --mode probe --task $sets
done
for seed in 41 42 43; do
    for arm in randommask dnabert single; do evaluate $arm $seed --task $sets --epochs 2 --lr 1e-3; done
    random=random: evaluate dnabert $seed --task $sets --epochs 2 --lr 1e-3
done
again="--epochs 2 --lr 1e-3 --seeds 2"            # two more fine-tuning seeds of each network
for seed in 41 42 43; do
    for arm in randommask dnabert single; do evaluate $arm $seed --task $sets $again --seed ${seed}0; done
    random=random: evaluate dnabert $seed --task $sets $again --seed ${seed}0
done
for seed in 44 45; do pretrain dnabert $seed --mask dnabert; done       # for experiment D alone
