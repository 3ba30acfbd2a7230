"""Interpreters, compilers and build tools."""

from __future__ import annotations

from pathlib import Path

from tests.compat.program import Program

_NO_CPUSET = (
    "on hosts with control groups of version 1: the report wants a group of `cpuset`, and no cage is in one; "
    "the heap and the number of processors are right"
    if Path("/sys/fs/cgroup/cpuset").exists()
    else ""
)
_BUILD = "--memory 1G --tmp 256M --tasks 256"
_GO_MAIN = r"""
cat >main.go <<'END'
package main

import ("fmt"; "net"; "runtime"; "sync")

func main() {
    var group sync.WaitGroup
    sum := make(chan int, 100)
    for i := 0; i < 100; i++ { group.Add(1); go func(n int) { defer group.Done(); sum <- n }(i) }
    group.Wait(); close(sum)
    total := 0
    for n := range sum { total += n }
    list, err := net.Interfaces()
    if err != nil || len(list) != 1 { panic(fmt.Sprint(list, err)) }
    fmt.Println(total, runtime.NumGoroutine())
}
END
"""

LANGUAGES = (
    Program("CPython", "threads, processes, sockets, SQLite, a TLS context", r"""
python3 - <<'END'
import concurrent.futures, multiprocessing, socket, sqlite3, ssl, tempfile, os
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(len, ["a"] * 100)) == 100
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
database = sqlite3.connect("/tmp/database")
database.execute("create table t (a)"); database.execute("insert into t values (1)"); database.commit()
assert [name for _, name in socket.if_nameindex()] == ["lo"]
ssl.create_default_context()
assert os.cpu_count() >= 1
END
""", packages="python3"),
    Program("Python's venv", "a virtual environment with its own script", r"""
python3 -m venv --without-pip env
printf '#!/tmp/env/bin/python3\nimport sys; assert sys.prefix == "/tmp/env"\n' >env/bin/tool
chmod +x env/bin/tool
env/bin/tool
""", packages="python3-venv"),
    Program("Node.js' interfaces", "the cage's own, and a server on them", r"""
cat >main.js <<'END'
const net = require('net'), os = require('os');
if (Object.keys(os.networkInterfaces()).join() !== 'lo') throw Error('interfaces');
const server = net.createServer(s => s.end('fine')).listen(0, '127.0.0.1', () =>
  net.connect(server.address().port, '127.0.0.1').on('data', d => process.exit(d == 'fine' ? 0 : 1)));
END
node main.js
""", packages="nodejs"),
    Program("Node.js", "workers, child processes, number of processors", r"""
cat >main.js <<'END'
const os = require('os'), {Worker} = require('worker_threads'), {execSync} = require('child_process');
if (os.cpus().length < 1 || os.availableParallelism() < 1) throw Error('no processor');
if (os.totalmem() < 1 || os.freemem() < 1 || os.uptime() < 0) throw Error('memory');
execSync('true');
new Worker('require("worker_threads").parentPort.postMessage(7)', {eval: true}).on('message', n => {
  if (n !== 7) process.exit(1);
});
END
node main.js
""", packages="nodejs"),
    Program("Node.js' heap", "a heap sized by the cap, not by the host", r"""
node -e 'const mb = require("v8").getHeapStatistics().heap_size_limit / 1048576; if (mb > 400) throw Error(mb)'
""", packages="nodejs", capped=True),
    Program("Java", "a program in one source file, with its own threads", r"""
cat >Main.java <<'END'
import java.util.stream.*;
public class Main {
    public static void main(String[] arguments) throws Exception {
        int sum = IntStream.range(0, 1000).parallel().sum();
        if (sum != 499500) throw new Exception();
        if (java.net.NetworkInterface.getByName("lo") == null) throw new Exception("no lo");
        java.time.ZonedDateTime.now();
    }
}
END
/usr/lib/jvm/java-17-openjdk-*/bin/java Main.java
""", flags="--memory 512M --tmp 64M", packages="openjdk-17-jdk-headless"),
    Program("Java's heap", "a heap and a number of processors from the cap, not from the host", r"""
cat >Main.java <<'END'
public class Main {
    public static void main(String[] arguments) throws Exception {
        if (Runtime.getRuntime().maxMemory() > 256L << 20) throw new Exception("" + Runtime.getRuntime().maxMemory());
    }
}
END
/usr/lib/jvm/java-17-openjdk-*/bin/java Main.java
""", flags="--memory 512M", capped=True, packages="openjdk-17-jdk-headless"),
    Program("Java's report", "`-XshowSettings:system`", r"""
/usr/lib/jvm/java-17-openjdk-*/bin/java -XshowSettings:system -version
""", flags="--memory 512M", packages="openjdk-17-jdk-headless", fails=_NO_CPUSET),
    Program("Go", "`go build`, then the binary: goroutines, interfaces", _GO_MAIN + r"""
export GOCACHE=/tmp/cache GOPATH=/tmp/go GOFLAGS=-mod=mod CGO_ENABLED=0
go build -o program main.go
test "$(./program)" = "4950 1"
""", flags=_BUILD, packages="golang-go"),
    Program("Go's tests", "`go test`, which builds and runs below /tmp", r"""
export GOCACHE=/tmp/cache GOPATH=/tmp/go GO111MODULE=off CGO_ENABLED=0
printf 'package x\nimport "testing"\nfunc TestX(t *testing.T) { if 1+1 != 2 { t.Fail() } }\n' >x_test.go
go test x_test.go
""", flags=_BUILD, packages="golang-go"),
    Program("Rust", "`rustc`, then the binary: threads, sockets", r"""
cat >main.rs <<'END'
use std::{net, process, thread};
fn main() {
    let sum: u32 = (0..4).map(|n| thread::spawn(move || n)).map(|t| t.join().unwrap()).sum();
    assert_eq!(sum, 6);
    assert!(thread::available_parallelism().unwrap().get() >= 1);
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert!(process::Command::new("true").status().unwrap().success());
}
END
/usr/bin/rustc main.rs
./main
""", flags=_BUILD, packages="rustc"),
    Program("Cargo", "a package with a unit test", r"""
export CARGO_HOME=/tmp/cargo
/usr/bin/cargo -q init --vcs none --name thing .
printf '#[test]\nfn sums() { assert_eq!(1 + 1, 2) }\nfn main() { println!("ran") }\n' >src/main.rs
/usr/bin/cargo -q test --offline
test "$(/usr/bin/cargo -q run --offline)" = ran
""", flags=_BUILD, packages="cargo", project=True),
    Program("gcc and make", "a library, a program with threads, two jobs at a time", r"""
printf 'int number(void) { return 7; }\n' >number.c
printf 'int number(void); int main(void) { return number() != 7; }\n' >main.c
printf 'main: main.o number.o\n\t$(CC) -pthread -o $@ $^\n' >Makefile
make -s -j2
./main
""", packages="gcc make", project=True),
    Program("g++", "C++ with exceptions and threads", r"""
cat >main.cc <<'END'
#include <future>
#include <stdexcept>
int main() {
    auto f = std::async(std::launch::async, [] { throw std::runtime_error("x"); return 1; });
    try { f.get(); } catch (std::runtime_error const &) { return 0; }
    return 1;
}
END
g++ -O1 -pthread -o main main.cc
./main
""", flags=_BUILD, packages="g++"),
    Program("CMake and Ninja", "configure, build, test", r"""
printf 'cmake_minimum_required(VERSION 3.20)\nproject(x C)\nadd_executable(x x.c)\nenable_testing()\nadd_test(x x)\n' \
    >CMakeLists.txt
printf 'int main(void) { return 0; }\n' >x.c
cmake -G Ninja -B out . >log
ninja -C out >>log
cd out
ctest >>log
""", flags=_BUILD, packages="cmake ninja-build gcc", project=True),
    Program("Meson", "configure and compile", r"""
printf "project('x', 'c')\nexecutable('x', 'x.c')\n" >meson.build
printf 'int main(void) { return 0; }\n' >x.c
meson setup out >log
meson compile -C out >>log
out/x
""", flags=_BUILD, packages="meson gcc", project=True),
    Program("flex and bison", "a scanner and a parser", r"""
printf '%%%%\n[0-9]+ printf("n");\n%%%%\nint main(void) { return yylex(); }\nint yywrap(void) { return 1; }\n' >x.l
flex x.l
gcc -o x lex.yy.c
test "$(printf 12 | ./x)" = n
printf '%%{\nint yylex(void); void yyerror(const char *s);\n%%}\n%%%%\ns: ;\n' >y.y
bison y.y
""", packages="flex bison gcc"),
    Program("OpenMP", "threads as many as it finds processors", r"""
printf '#include <omp.h>\nint main(void) { int n = 0;\n#pragma omp parallel reduction(+:n)\nn += 1;\n' >x.c
printf 'return n < 1 || n > 64; }\n' >>x.c
gcc -fopenmp -o x x.c
./x
""", packages="gcc"),
    Program("Maven", "its own start and settings (nothing to fetch)", r"""
export MAVEN_OPTS=-Duser.home=/tmp
mvn -o --version >log
grep -q 'Java version: 17' log
""", flags="--memory 512M", packages="maven openjdk-17-jdk-headless"),
    Program("javac and jar", "compile, pack and run a jar", r"""
mkdir -p src
printf 'public class Hi { public static void main(String[] a) { System.out.println("hi"); } }\n' >src/Hi.java
PATH=$(echo /usr/lib/jvm/java-17-openjdk-*/bin):$PATH
javac -d out src/Hi.java
jar --create --file hi.jar --main-class Hi -C out .
test "$(java -jar hi.jar)" = hi
""", flags="--memory 512M --tmp 64M", packages="openjdk-17-jdk-headless", project=True),
    Program("jlink", "a runtime of its own, and a program on it", r"""
PATH=$(echo /usr/lib/jvm/java-17-openjdk-*/bin):$PATH
printf 'class Hi { public static void main(String[] a) { System.out.println("hi"); } }\n' >Hi.java
javac Hi.java
jlink --add-modules java.base --output runtime
test "$(runtime/bin/java -cp . Hi)" = hi
""", flags="--memory 1G --tmp 256M", packages="openjdk-17-jdk-headless"),
    Program("Perl", "fork, pipes, a socket", r"""
perl -MIO::Socket::INET -e '
    my $l = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die;
    if (!fork) { IO::Socket::INET->new($l->sockhost . ":" . $l->sockport)->print("fine\n"); exit }
    my $got = $l->accept->getline; wait; die $got unless $got eq "fine\n"'
""", packages="perl"),
    Program("Ruby", "threads, processes, its standard library", r"""
ruby -rjson -rsocket -rtempfile -retc -e '
    raise unless Thread.new { 7 }.value == 7
    pid = fork { exit 3 }; Process.wait pid; raise unless $?.exitstatus == 3
    Tempfile.create("x") { |f| f.write "x" }
    raise unless Etc.nprocessors >= 1
    raise unless Socket.getifaddrs.map(&:name).uniq == ["lo"]'
""", packages="ruby"),
    Program("PHP", "its own web server and a request to it", r"""
printf '<?php echo "sum ", array_sum([1, 2, 3]);\n' >index.php
php -S 127.0.0.1:8000 >log 2>&1 &
up 8000
test "$(php -r 'echo file_get_contents("http://127.0.0.1:8000/");')" = "sum 6"
""", packages="php-cli"),
    Program("Lua", "coroutines and files", r"""
lua5.4 -e '
    local c = coroutine.wrap(function() for i = 1, 3 do coroutine.yield(i) end end)
    assert(c() + c() + c() == 6)
    local f = assert(io.open("/tmp/x", "w")); f:write("x"); f:close()
    assert(io.popen("echo hi"):read() == "hi")'
""", packages="lua5.4"),
    Program("Tcl", "events and a pipe", r"""
echo 'after 10 {set done 1}; vwait done; if {[exec echo hi] ne "hi"} {exit 1}' | tclsh
""", packages="tcl"),
    Program("Erlang", "processes and messages on its scheduler", r"""
erl -noshell -eval 'S = self(), spawn(fun() -> S ! 7 end), receive 7 -> halt(0) after 20000 -> halt(1) end'
""", flags="--memory 512M", packages="erlang-base"),
    Program("bash", "job control, process substitution, here-documents, traps", r"""
set -m
sleep 30 &
kill %1
wait %1 || test $? = 143
diff <(seq 3) <(printf '1\n2\n3\n')
(trap 'echo out' EXIT) | found out
ulimit -c 0
""", packages="bash"),
    Program("dash and coreutils", "pipes over files, links, archives", r"""
sh -euc '
    mkdir -p a/b; echo text >a/b/file; cp -r a c; mv c d; ln -s d e; ln a/b/file hard
    test "$(seq 100 | sort -rn | awk "{s += \$1} END {print s}")" = 5050
    tar cf t.tar a; tar tf t.tar >/dev/null; sync; sync -f t.tar; df /tmp >/dev/null; nproc >/dev/null; date >/dev/null
    rm -r a d e'
""", packages="dash coreutils"),
    Program("TypeScript", "compile and run", r"""
printf 'const sum = (list: number[]): number => list.reduce((a, b) => a + b, 0);\nconsole.log(sum([1, 2, 3]));\n' >x.ts
tsc --lib es2020,dom x.ts
test "$(node x.js)" = 6
""", flags="--memory 512M", packages="node-typescript nodejs"),
    Program("esbuild", "bundle two modules", r"""
printf 'export const a = 7;\n' >a.js
printf 'import {a} from "./a.js"; console.log(a);\n' >b.js
esbuild --bundle b.js --outfile=c.js --log-level=error
test "$(node c.js)" = 7
""", packages="esbuild nodejs"),
    Program("GNU awk", "a pipe and a sorted array", r"""
test "$(printf '3\n1\n2\n' | gawk '{a[NR] = $1} END {n = asort(a); for (i = 1; i <= n; i++) printf a[i]}')" = 123
""", packages="gawk"),
    Program("Clang", "compile with the address sanitiser off and on", r"""
printf '#include <stdlib.h>\nint main(void) { char *p = malloc(1); free(p); return 0; }\n' >x.c
clang -o x x.c
./x
""", flags=_BUILD, packages="clang", more=True),
    Program("GHC", "compile a lazy list", r"""
printf 'main = print (sum (takeWhile (< 100) [1 ..]))\n' >x.hs
ghc -v0 x.hs
test "$(./x)" = 4950
""", flags=f"{_BUILD} --read /var/lib/ghc", packages="ghc", more=True),
    Program("OCaml", "compile and run", r"""
printf 'let () = print_int (List.fold_left (+) 0 [1; 2; 3])\n' >x.ml
ocamlfind ocamlopt -package str x.ml -o x 2>/dev/null || ocamlopt -o x x.ml
test "$(./x)" = 6
""", flags=_BUILD, packages="ocaml-nox", more=True),
    Program("R", "a model and a plot", r"""
Rscript -e 'm <- lm(dist ~ speed, cars); stopifnot(abs(coef(m)[2] - 3.93) < 0.01); pdf("x.pdf"); plot(cars); dev.off()'
test -s x.pdf
""", flags="--memory 512M", packages="r-base-core", more=True),
    Program("Octave", "solve a system", r"""
octave-cli --eval 'x = [2 0; 0 4] \ [2; 4]; assert (x, [1; 1])'
""", flags="--memory 512M", packages="octave", more=True),
)  # fmt: skip
