# What the scripts beside it share: their first word is a command of scripts/, the others are its flags.
if [ $# -eq 0 ] || [ ! -f "scripts/$1.py" ]; then
    echo "usage: $0 COMMAND [--FLAG VALUE ...], with a command such as image_train" >&2
    exit 2
fi
words=("scripts/$1.py")
case $1 in *_train) words+=(--resume_checkpoint auto) ;; esac # a flag of the command line that follows has the last word
words+=("${@:2}")
RANKS=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$RANKS" -gt 0 ] || RANKS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
