# Sourced by the scripts of the experiments. A finished run is skipped, one that was stopped is continued.
export OMP_NUM_THREADS=1
gems="--k 3 --block_size 34 --n_layer 2 --n_head 4 --n_embd 64 --n_inner 256 --dropout 0 --batch_size 64
    --micro_batch_size 32"                      # of CM-GEMS in the experiments B and E
pretrain_run() {                                # SCRIPT STEPS OUT FLAGS
    script=$1; steps=$2; out=$3; shift 3
    grep -q "\"step\": $steps," $out/log.jsonl 2> /dev/null && return
    [ ! -e $out/last.pt ] || { python $script --resume --out $out; return; }
    ! [ -e $out/lock ] || flock -n $out/lock true || { echo "$out: a run is in it"; return 1; }
    rm -rf $out
    python $script --steps $steps --out $out "$@"
}
