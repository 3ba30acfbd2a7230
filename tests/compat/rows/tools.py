"""Tools that people and agents call: files, media, terminals, versions, looking at the system."""

from __future__ import annotations

from tests.compat.program import Program

_NO_TRACING = "`ptrace` is refused: who traces a process decides what it does, past every answer of the filter"
_NO_NAMESPACES = "new namespaces are refused: in one of its own a process reaches most of the kernel's faults"

TOOLS = (
    Program("git", "init, commit, branch, merge, clone, gc", r"""
git init -q .
git config user.name a
git config user.email a@b
echo 1 >x
git add x
git commit -q -m one
git checkout -q -b other
echo 2 >>x
git commit -q -a -m two
git checkout -q -
git merge -q other
git gc -q
git clone -q . copy
test "$(git -C copy log --format=%s | wc -l)" = 2
""", packages="git", project=True),
    Program("Mercurial", "init, commit, update", r"""
hg init .
echo 1 >x
hg add -q x
hg commit -q -u a -m one
test "$(hg log -T '{desc}')" = one
""", packages="mercurial", project=True),
    Program("Subversion", "a repository, a check-out, a commit", r"""
export HOME=/tmp
svnadmin create repo
svn checkout -q file:///tmp/repo work
cd work
echo 1 >x
svn add -q x
svn commit -q -m one
""", packages="subversion"),
    Program("ripgrep", "search a tree on several threads", r"""
mkdir -p a/{1..20}
for d in a/*; do seq 1000 >$d/file; done
test "$(rg -l '^777$' a | wc -l)" = 20
""", packages="ripgrep"),
    Program("fd", "find files on several threads", r"""
mkdir -p a/{1..20}
touch a/{1..20}/x.c
test "$(fdfind -e c . a | wc -l)" = 20
""", packages="fd-find"),
    Program("find and xargs", "two processes at a time", r"""
mkdir -p a/{1..20}
touch a/{1..20}/x
test "$(find a -name x -print0 | xargs -0 -P 2 -n 1 basename | sort -u)" = x
""", packages="findutils"),
    Program("jq", "a filter", r"""
test "$(echo '{"a": [1, 2, 3]}' | jq '.a | add')" = 6
""", packages="jq"),
    Program("SQLite", "a write-ahead log and a query", r"""
sqlite3 x.db 'pragma journal_mode = wal; create table t (a); insert into t values (1), (2);' >/dev/null
test "$(sqlite3 x.db 'select sum(a) from t')" = 3
""", packages="sqlite3"),
    Program("curl", "upload and download over the cage's loopback", r"""
echo fine >x
python3 -m http.server -b 127.0.0.1 8000 >log 2>&1 &
up 8000
test "$(curl -sf http://localhost:8000/x)" = fine
""", packages="curl"),
    Program("Wget", "mirror a folder", r"""
mkdir -p www/a
echo fine >www/a/x
python3 -m http.server -b 127.0.0.1 -d www 8000 >log 2>&1 &
up 8000
wget -q -r -np -nH -P got http://127.0.0.1:8000/a/
test "$(cat got/a/x)" = fine
""", packages="wget"),
    Program("aria2", "one file in four parts", r"""
mkdir -p www got
head -c 8000000 /dev/zero >www/x
python3 -m http.server -b 127.0.0.1 -d www 8000 >log 2>&1 &
up 8000
aria2c -q -d got -x 4 -s 4 --file-allocation=falloc http://127.0.0.1:8000/x
cmp www/x got/x
""", flags="--tmp 64M", packages="aria2"),
    Program("rclone", "sync two folders", r"""
mkdir a
seq 100 >a/x
rclone --config /dev/null sync a b
cmp a/x b/x
""", packages="rclone"),
    Program("rsync", "a tree with times, links and sparse files", r"""
mkdir -p a
seq 100 >a/x
ln -s x a/y
truncate -s 1M a/z
rsync -aS a/ b/
diff -r a b
""", packages="rsync"),
    Program("restic", "a backup and a restore", r"""
export RESTIC_PASSWORD=x RESTIC_CACHE_DIR=/tmp/cache
mkdir a
seq 1000 >a/x
restic -q -r repo init >/dev/null
restic -q -r repo backup a
restic -q -r repo restore latest --target out
diff a/x out/tmp/a/x 2>/dev/null || diff a/x out/a/x
""", flags="--memory 512M --tmp 64M", packages="restic"),
    Program("Borg", "a backup and a check", r"""
export BORG_BASE_DIR=/tmp/borg
mkdir a
seq 1000 >a/x
borg init -e none repo
borg create repo::one a
borg check repo
test "$(borg list --short repo)" = one
""", packages="borgbackup"),
    Program("tar, gzip, xz, zstd, bzip2", "pack and unpack", r"""
mkdir a
seq 10000 >a/x
for c in gzip xz zstd bzip2; do
    tar -c --use-compress-program=$c -f t.tar a
    mkdir b
    tar -x --use-compress-program=$c -f t.tar -C b
    cmp a/x b/a/x
    rm -r b
done
""", packages="tar gzip xz-utils zstd bzip2"),
    Program("zip and 7-Zip", "pack and unpack", r"""
seq 10000 >x
zip -q x.zip x
unzip -q -o x.zip -d out
cmp x out/x
7z a -bd x.7z x >/dev/null
7z t x.7z >/dev/null
""", packages="zip unzip p7zip-full"),
    Program("GnuPG", "a key, a signature, an encrypted file", r"""
export GNUPGHOME=/tmp/gnupg
mkdir -m 0700 gnupg
gpg -q --batch --passphrase '' --quick-generate-key a@b future-default default never 2>/dev/null
echo text >x
gpg -q --batch --sign -o s x
gpg -q --batch --verify s 2>/dev/null
gpg -q --batch -r a@b -e -o e x
test "$(gpg -q --batch -d e 2>/dev/null)" = text
""", packages="gnupg"),
    Program("FFmpeg", "make a video with sound, read it back", r"""
ffmpeg -loglevel error -f lavfi -i testsrc=d=1:s=160x120 -f lavfi -i sine=d=1 -c:v mpeg4 -c:a aac -y x.mp4
test "$(ffprobe -v error -select_streams v -show_entries stream=width -of csv=p=0 x.mp4)" = 160
""", flags="--memory 512M", packages="ffmpeg"),
    Program("SoX", "make and measure a sound", r"""
sox -n x.wav synth 1 sine 440
soxi -D x.wav | found '^1\.'
""", packages="sox"),
    Program("ImageMagick", "draw text, convert", r"""
/usr/bin/convert-im6.q16 -size 200x60 xc:white -font DejaVu-Sans -pointsize 20 -draw 'text 10,30 "grün"' x.png
test "$(/usr/bin/identify-im6.q16 -format '%w' x.png)" = 200
""", packages="imagemagick fonts-dejavu-core fontconfig"),
    Program("fontconfig", "find a font that is installed", r"""
fc-match -f '%{family}' 'DejaVu Sans' | found 'DejaVu Sans'
""", packages="fontconfig fonts-dejavu-core"),
    Program("Ghostscript", "PostScript to PDF", r"""
printf '%%!\n/Helvetica findfont 20 scalefont setfont 100 100 moveto (hi) show showpage\n' >x.ps
gs -q -dNOPAUSE -dBATCH -sDEVICE=pdfwrite -sOutputFile=x.pdf x.ps
test -s x.pdf
""", packages="ghostscript"),
    Program("Poppler and qpdf", "text and pages of a PDF", r"""
printf '%%!\n/Helvetica findfont 20 scalefont setfont 100 100 moveto (hello) show showpage\n' >x.ps
gs -q -dNOPAUSE -dBATCH -sDEVICE=pdfwrite -sOutputFile=x.pdf x.ps
pdftotext x.pdf - | found hello
test "$(qpdf --show-npages x.pdf)" = 1
""", packages="poppler-utils qpdf ghostscript"),
    Program("Tesseract", "read text off an image", r"""
export OMP_THREAD_LIMIT=1
/usr/bin/convert-im6.q16 -size 400x100 xc:white -font DejaVu-Sans -pointsize 48 -draw 'text 20,65 "HELLO"' x.png
tesseract x.png - 2>/dev/null | found HELLO
""", flags="--memory 512M", packages="tesseract-ocr imagemagick fonts-dejavu-core"),
    Program("Graphviz", "lay out a graph as SVG", r"""
echo 'digraph { a -> b -> c }' | dot -Tsvg >x.svg
grep -q '</svg>' x.svg
""", packages="graphviz fonts-dejavu-core"),
    Program("gnuplot", "a plot as SVG", r"""
gnuplot -e 'set terminal svg; set output "x.svg"; plot sin(x)'
grep -q '</svg>' x.svg
""", packages="gnuplot-nox"),
    Program("Hugo", "build a site", r"""
hugo new site s >/dev/null
cd s
mkdir -p layouts/_default
echo '{{ .Content }}' >layouts/_default/single.html
printf -- '---\ntitle: x\n---\nfine\n' >content/x.md
hugo --quiet
grep -q fine public/x/index.html
""", flags="--memory 512M", packages="hugo"),
    Program("Ansible", "a playbook on the cage itself", r"""
export HOME=/tmp ANSIBLE_LOCAL_TEMP=/tmp/a ANSIBLE_REMOTE_TEMP=/tmp/r
printf -- '- hosts: localhost\n  connection: local\n  gather_facts: no\n  tasks:\n' >p.yml
printf -- '  - copy: {content: fine, dest: /tmp/x}\n' >>p.yml
ansible-playbook -i localhost, p.yml >log 2>&1 || { cat log; exit 1; }
test "$(cat x)" = fine
""", flags="--memory 512M", packages="ansible-core"),
    Program("ShellCheck", "find a fault in a script", r"""
printf '#!/bin/sh\necho $1\n' >x.sh
shellcheck x.sh >log && exit 1
grep -q SC2086 log
""", packages="shellcheck"),
    Program("tmux", "a session, a key, its screen", r"""
export TERM=screen
tmux -f /dev/null -S /tmp/t new-session -d -x 80 -y 24 'cat >/tmp/typed'
tmux -S /tmp/t send-keys fine Enter
for i in $(seq 100); do grep -qs fine typed && break; sleep 0.1; done
tmux -S /tmp/t kill-server
grep -q fine typed
""", packages="tmux"),
    Program("Screen", "a session in the background", r"""
export SCREENDIR=/tmp/screens TERM=screen
mkdir -m 0700 screens
screen -dmS s sh -c 'tty >/tmp/tty; sleep 30'
for i in $(seq 100); do test -s tty && break; sleep 0.1; done
grep -q /dev/pts/ tty
""", packages="screen"),
    Program("Expect", "talk to a program on a terminal", r"""
expect -c '
    spawn -noecho sh -c {read x; echo got $x; tty}
    send "fine\r"
    expect "got fine" {} timeout {exit 1}
    expect "/dev/pts" {} timeout {exit 1}' >log
""", packages="expect"),
    Program("script", "record a terminal", r"""
script -qec 'tty; stty size' typescript >/dev/null
grep -q /dev/pts/ typescript
""", packages="bsdutils"),
    Program("Vim", "edit a file by keys", r"""
printf 'one\ntwo\n' >x
TERM=dumb vim.tiny -es -u NONE -c '%s/two/three/' -c wq x </dev/null
grep -q three x
""", packages="vim-tiny"),
    Program("ps, free, uptime, top", "processes of the cage, and nothing missing", r"""
ps -e -o comm= | sort -u >seen
test "$(ps -e | wc -l)" -lt 12
free -m | found '^Mem:'
uptime >/dev/null
TERM=dumb top -b -n 1 | found top
vmstat >/dev/null
""", packages="procps"),
    Program("free", "the cap as the machine's memory", r"""
free -m | awk '/^Mem:/ { exit $2 > 256 }'
""", packages="procps", capped=True),
    Program("pgrep, pkill, killall, pstree", "find and end a process", r"""
sleep 300 &
pgrep -x sleep >/dev/null
pstree -p >/dev/null
killall sleep
wait || true
! pgrep -x sleep >/dev/null
""", packages="procps psmisc"),
    Program("lscpu, lsblk, nproc", "what they find of the machine", r"""
test "$(nproc)" -ge 1
lscpu >/dev/null
getconf _NPROCESSORS_ONLN >/dev/null
""", packages="util-linux coreutils"),
    Program("ip", "the cage's own interface", r"""
ip -o link | found '^1: lo'
test "$(ip -o link | wc -l)" = 1
ip -o addr | found 127.0.0.1
""", packages="iproute2"),
    Program("ss", "the cage's own sockets, from `/proc` (it says that its netlink family is refused)", r"""
python3 -m http.server -b 127.0.0.1 8000 >log 2>&1 &
up 8000
ss -ltn | found ':8000'
""", packages="iproute2"),
    Program("BusyBox", "a shell and applets in one static binary", r"""
busybox sh -euc 'busybox seq 10 | busybox awk "{s += \$1} END {exit s != 55}"; busybox httpd -p 127.0.0.1:8000 -h /tmp'
up 8000
""", packages="busybox-static"),
    Program("flock, timeout, setsid, nice, stdbuf", "they run other programs", r"""
flock lock -c true
timeout 20 true
setsid -w true
nice -n 5 true
stdbuf -oL true
nohup true 2>/dev/null
""", packages="util-linux coreutils"),
    Program("strace", "look on at a child", r"""
strace -o log true
grep -q execve log
""", packages="strace", fails=_NO_TRACING),
    Program("gdb", "run a program to a breakpoint", r"""
printf 'int main(void) { return 0; }\n' >x.c
gcc -g -o x x.c
gdb -q -batch -ex 'break main' -ex run ./x >log 2>&1
grep -q 'Breakpoint 1, main' log
""", packages="gdb gcc", flags="--memory 512M", fails=_NO_TRACING),
    Program("Valgrind", "find a leak", r"""
printf '#include <stdlib.h>\nint main(void) { malloc(7); return 0; }\n' >x.c
gcc -g -o x x.c
valgrind --leak-check=full --error-exitcode=0 ./x 2>log
grep -q '7 bytes in 1 blocks' log
""", packages="valgrind gcc libc6-dbg", flags="--memory 512M"),
    Program("unshare", "a sandbox within the cage", r"""
unshare -Ur true
""", packages="util-linux", fails=_NO_NAMESPACES),
    Program("bubblewrap", "a sandbox within the cage", r"""
bwrap --ro-bind / / true
""", packages="bubblewrap", fails=_NO_NAMESPACES),
    Program("ping", "an echo from the cage's loopback", r"""
ping -c 1 -w 20 127.0.0.1 >/dev/null
""", packages="iputils-ping", fails="raw and ICMP sockets are refused: the broker carries TCP and names alone"),
    Program("bc and dc", "arbitrary precision", r"""
test "$(echo '2 ^ 100' | bc)" = 1267650600228229401496703205376
test "$(echo '3 4 * p' | dc)" = 12
""", packages="bc dc"),
    Program("date and time zones", "another zone, and the host's", r"""
test "$(TZ=Asia/Tokyo date -d @0 +%H)" = 09
date >/dev/null
""", packages="tzdata coreutils"),
    Program("locale", "sort and print in UTF-8", r"""
test "$(printf 'ä\n' | LC_ALL=C.UTF-8 grep -c '^.$')" = 1
locale >/dev/null
""", packages="libc-bin"),
    Program("pandoc", "Markdown to HTML", r"""
test "$(echo '*hi*' | pandoc)" = '<p><em>hi</em></p>'
""", flags="--memory 512M", packages="pandoc", more=True),
    Program("LibreOffice", "a document to PDF, without a screen", r"""
export HOME=/tmp
echo 'hello' >x.txt
soffice --headless --convert-to pdf x.txt >log 2>&1
test -s x.pdf
""", flags="--memory 1G --tmp 256M --tasks 256", packages="libreoffice-writer-nogui", more=True),
    Program("LaTeX", "a page", r"""
printf '\\documentclass{article}\\begin{document}hi\\end{document}\n' >x.tex
pdflatex -interaction=batchmode x.tex >/dev/null
test -s x.pdf
""", flags="--memory 512M --tmp 64M --read /var/lib/texmf", packages="texlive-latex-base", more=True),
)  # fmt: skip
