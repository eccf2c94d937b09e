# Experiment B, tenfold budget, of results/PLAN.md. Run it in the repository's folder: bash results/cm_gems_long.sh
# It needs data/human_regions.fa.gz, data/GUE and data/fewshot. Run it again to continue: finished runs are skipped.
set -e
. results/pretrain.sh
python results/draw.py out/cm_gems_long

pretrain() {                                    # ARM SEED FLAGS
    arm=$1; seed=$2; shift 2
    pretrain_run cm_gems.py 15000 out/cm_gems_long/$arm/$seed --seed $seed $gems --lr 5e-3 \
        --genome data/human_regions.fa.gz --cache out/cm_gems_long/cache --log_every 500 "$@"
}

tune() { python finetune.py --init $init --out out/cm_gems_long/scores "$@"; }
evaluate() {                                    # INIT SEED
    init=$1; seed=$2; first=$seed
    [[ $init != random:* ]] || first=${seed}0   # --seed draws random weights: no two seeds share a network
    tune --tasks out/cm_gems_long/drawn.tsv --seed $first --seeds 1
    tune --task prom_core splice_40 silencer prom_300 cohn_enh --shots 10 --seed $first --seeds 3
    tune --task prom_core splice_40 prom_300 cohn_enh --shots 50 --seed $first --seeds 3
    tune --task prom_core prom_300 --shots 100 --seed $first --seeds 3
    tune --mode probe --seed $first --seeds 1 --task \
        tf_m/0 tf_m/1 tf_h/2 tf_h/4 cpd/tata cpd/all pd/all emp/H3 emp/H3K36me3 ssp/reconstructed
}

evaluate kmer 61
for seed in 61 62 63; do
    pretrain cm_gems $seed --strategy cm_gems --switch_after 6000
    for arm in genemask random; do pretrain $arm $seed --strategy $arm; done
    for arm in cm_gems genemask random; do evaluate out/cm_gems_long/$arm/$seed/last.pt $seed; done
    evaluate random:out/cm_gems_long/genemask/$seed/last.pt $seed
done
for seed in 61 62 63; do
    for arm in global cm_step; do
        pretrain $arm $seed --strategy $arm
        evaluate out/cm_gems_long/$arm/$seed/last.pt $seed
    done
done
