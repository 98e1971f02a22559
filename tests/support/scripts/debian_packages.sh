# Debian packages unpacked into a folder, for the scripts beside this one, which source it: nothing is installed, and no
# root is needed. `say` and `die` are the scripts' own.

# unpack FOLDER WHY PACKAGE...: what `apt-get install` of these (options may stand before them) would install, into
# FOLDER/root. Dies with WHY where that is nothing.
unpack() {
    local folder=$1 why=$2 wanted package
    shift 2
    command -v apt-get dpkg >/dev/null || die "install needs apt-get and dpkg"
    mkdir -p "$folder/packages" "$folder/root"
    # Lists of packages may be missing in a container; without root they cannot be updated, and need not be.
    apt-get update -qq 2>/dev/null || say "the package lists could not be updated; going on with those there are"
    wanted=$(apt-get install --simulate --no-install-recommends "$@" | awk '$1 == "Inst" { print $2 }')
    [ -n "$wanted" ] || die "$why"
    # shellcheck disable=SC2086
    (cd "$folder/packages" && apt-get download -qq -o APT::Sandbox::User=root $wanted)
    for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/root"; done
    rm -r "$folder/packages"
}

# libraries ROOT: the folder of unpacked libraries, such as ROOT/usr/lib/x86_64-linux-gnu.
libraries() { (cd "$1/usr/lib" && echo "$PWD/$(ls -d -- *-linux-gnu | head -n 1)"); }
