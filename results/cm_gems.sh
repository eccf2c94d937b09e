# Experiment B of results/PLAN.md. Run it in the repository's folder: bash results/cm_gems.sh
# It needs data/human_regions.fa.gz, data/GUE and data/fewshot. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh

pretrain() {                                    # ARM SEED FLAGS
    arm=$1; seed=$2; shift 2
    pretrain_run cm_gems.py 1500 out/cm_gems/$arm/$seed --seed $seed $gems --lr 5e-3 \
        --genome data/human_regions.fa.gz --cache out/cm_gems/cache --log_every 100 "$@"
}

few_shot() { python finetune.py --init $init --seed $first --seeds 3 --out out/cm_gems/scores "$@"; }
score() {                                       # INIT SEED
    init=$1; seed=$2; first=$seed
    [[ $init != random:* ]] || first=${seed}0   # --seed draws random weights: no two seeds share a network
    few_shot --task prom_core splice_40 silencer prom_300 cohn_enh --shots 10
    few_shot --task prom_core splice_40 prom_300 --shots 50
    few_shot --task prom_core --shots 100
    python finetune.py --init $init --mode probe --task tf_m/0 tf_h/2 cpd/tata --seed $seed --seeds 1 \
        --out out/cm_gems/scores
}

evaluate() { score ${random}out/cm_gems/$1/$2/last.pt $2; }     # ARM SEED

score kmer 31
pretrain cm_gems_free 31 --strategy cm_gems
for seed in 31 32 33; do
    pretrain cm_gems $seed --strategy cm_gems --switch_after 600
    for arm in genemask random; do pretrain $arm $seed --strategy $arm; done
    for arm in cm_gems genemask random; do evaluate $arm $seed; done
    random=random: evaluate genemask $seed
done
for seed in 31 32 33; do
    for arm in global cm_step; do
        pretrain $arm $seed --strategy $arm
        evaluate $arm $seed
    done
done

more_draws() {                                  # INIT SEED: of the sets whose files hold ten draws
    init=$1; first=$2
    for shots in 10 50; do
        sets=splice_40; [ $shots != 10 ] || sets="splice_40 silencer"
        python finetune.py --init $init --seed $first --seeds 10 --out out/cm_gems/scores --task $sets --shots $shots
    done
}
more_draws kmer 31
for seed in 31 32 33; do
    for arm in cm_gems genemask random global cm_step; do more_draws out/cm_gems/$arm/$seed/last.pt $seed; done
    more_draws random:out/cm_gems/genemask/$seed/last.pt ${seed}0
done

larger() {                                      # INIT SEED: the largest training sets up to 100 rows per class
    init=$1; first=$2
    few_shot --task cohn_enh --shots 50
    few_shot --task prom_300 --shots 100
}
larger kmer 31
for seed in 31 32 33; do
    for arm in cm_gems genemask random global cm_step; do larger out/cm_gems/$arm/$seed/last.pt $seed; done
    larger random:out/cm_gems/genemask/$seed/last.pt ${seed}0
done
