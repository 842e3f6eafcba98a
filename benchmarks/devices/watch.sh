# sh watch.sh FOLDER SECONDS BATTERY COMMAND...
# Runs a command on a device and says, line by line, what the system tells of it: every SECONDS its memory, and current,
# voltage and status of the battery (a folder of /sys/class/power_supply; -: none). Then how it ended, and what it said.
# When our own input ends, whoever started it is gone: the command is ended.
trap '' HUP
folder=$1 every=$2 battery=$3
shift 3
exec 3<&0 </dev/null
"$@" >"$folder/out" 2>"$folder/err" 3<&- &
runner=$!
(
    read -r _ <&3
    kill -9 $runner
) >/dev/null 2>&1 &
guard=$!
exec 3<&-

value() {
    read -r "$1" <"$battery/$2"
}

tick() {
    state='' peak=- anonymous=- file=- swap=- current=- voltage=- status=-
    while read -r key number _; do
        case $key in
            State:) state=$number ;;
            VmHWM:) peak=$number ;;
            RssAnon:) anonymous=$number ;;
            RssFile:) file=$number ;;
            VmSwap:) swap=$number ;;
        esac
    done <"/proc/$runner/status"
    read -r up _ </proc/uptime
    if [ "$battery" != - ]; then
        value current current_now
        value voltage voltage_now
        value status status
    fi
    echo "tick $up $peak $anonymous $file $swap $current $voltage ${status%% *}"
    [ -n "$state" ] && [ "$state" != Z ]
}

while tick 2>/dev/null; do
    sleep "$every"
done
wait $runner
echo "exit $?"
kill $guard 2>/dev/null
tail -n 20 "$folder/err" | sed 's/^/said /'
echo output
cat "$folder/out"
