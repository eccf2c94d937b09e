# Experiment E of results/PLAN.md. Run it in the repository's folder: bash results/across.sh
# It needs data/human_regions.fa.gz, data/GUE and data/fewshot. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh

pretrain() {                                    # SCRIPT ARM SEED STEPS FLAGS
    script=$1.py; out=out/across/$2/$3; seed=$3; steps=$4; shift 4
    pretrain_run $script $steps $out --seed $seed --genome data/human_regions.fa.gz \
        --cache out/across/cache --lr 5e-3 --log_every 500 "$@"
}

evaluate() {                                    # INIT SEED FLAGS
    init=$1; seed=$2; first=$seed; shift 2
    [[ $init != random:* ]] || first=${seed}0   # --seed draws random weights: no two seeds share a network
    python finetune.py --init $init --mode probe --seed $seed --seeds 1 --out out/across/scores "$@" --task \
        tf_m/0 tf_m/1 tf_h/2 tf_h/4 cpd/tata cpd/all pd/all emp/H3 emp/H3K36me3 ssp/reconstructed
    python finetune.py --init $init --seed $first --seeds 3 --out out/across/scores "$@" --shots 10 --task \
        prom_core splice_40 silencer prom_300 cohn_enh
}

evaluate kmer 41
bert="--block_size 34 --n_layer 2 --n_head 4 --n_embd 64 --dropout 0"
for seed in 41 42 43; do                        # 7.1 TFLOP each: 2.960, 1.368 and 1.230 GFLOP a step
    pretrain randommask randommask $seed 2400 $bert --k 4 --batch_size 128 --micro_batch_size 128 --warmup 120
    pretrain cm_gems cm_gems $seed 5190 $gems --switch_after 2076
    pretrain findna findna $seed 5774 --length 64 --n_layer 1 --track_size 6 --hidden 96 --batch_size 32 \
        --micro_batch_size 32
    for arm in randommask cm_gems findna; do
        network=; [ $arm != findna ] || network="--eval_network teacher"
        evaluate out/across/$arm/$seed/last.pt $seed $network
        evaluate random:out/across/$arm/$seed/last.pt $seed
    done
done
for arm in genemask random; do                  # the longer budget of experiment B
    for seed in 41 42 43; do
        pretrain cm_gems $arm $seed 5190 $gems --strategy $arm
        evaluate out/across/$arm/$seed/last.pt $seed
    done
done

python results/draw.py out/across
more() {                                        # INIT SEED FLAGS: the sets of B's tenfold budget, ten draws
    init=$1; first=$2; shift 2
    tune() { python finetune.py --init $init --seed $first --out out/across/scores "$@"; }
    tune --seeds 10 --shots 10 --task splice_40 silencer "$@"
    tune --seeds 10 --shots 50 --task splice_40 "$@"
    tune --seeds 3 --shots 50 --task prom_core prom_300 cohn_enh "$@"
    tune --seeds 3 --shots 100 --task prom_core prom_300 "$@"
    tune --seeds 1 --tasks out/across/drawn.tsv "$@"
}
more kmer 41
for seed in 41 42 43; do
    for arm in randommask cm_gems findna; do
        network=; [ $arm != findna ] || network="--eval_network teacher"
        more out/across/$arm/$seed/last.pt $seed $network
        more random:out/across/$arm/$seed/last.pt ${seed}0
    done
done
