#!/usr/bin/perl
# Verifies an audit trail without Isolator: perl and openssl (3.0 or newer) as Debian ships them, nothing else.
#
#     perl verify.pl public.pem audit.000000000001.jsonl ... audit.jsonl      (all files, oldest first)
#
# Exit 0 and a summary if everything fits; exit 1 and the first record that does not.
# With PREV=HASH in the environment the first file may continue one that is not given; HASH ends that one.
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use File::Temp qw(tempdir);

my ($pem, @files) = @ARGV;
die "usage: verify.pl public.pem FILE...\n" unless @files;
my $dir = tempdir(CLEANUP => 1);

# public.pem holds every key that was ever used. A key is named by the first 16 hex digits of the SHA-256 of its
# 32 raw bytes, which are the last 32 of its DER form.
my %key;
open my $in, '<', $pem or die "$pem: $!\n";
my $text = do { local $/; <$in> };
while ($text =~ /(-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n)/sg) {
    my $file = "$dir/key" . keys %key;
    spill($file, $1);
    my $der = qx(openssl pkey -pubin -in $file -outform DER);
    $key{ substr sha256_hex(substr $der, -32), 0, 16 } = $file;
}

my ($seq, $prev, $sealed, $seals, $place) = (0, $ENV{PREV} // '0' x 64, 0, 0, '');
my $start = !defined $ENV{PREV};
for my $file (@files) {
    open my $lines, '<:raw', $file or die "$file: $!\n";
    while (my $line = <$lines>) {
        $place = "$file line $.";
        if ($line !~ /\n\z/) { print "note: the last line is unfinished ($place)\n"; last }
        # The hash is the last key of a line and covers every byte before ,"hash":
        $line =~ /\A(\{"seq":([1-9]\d*),.*,"prev":"([0-9a-f]{64})"),"hash":"([0-9a-f]{64})"\}\n\z/
            or bad('is no record');
        my ($body, $number, $before, $hash) = ($1, $2, $3, $4);
        $seq = $number - 1 if !$start && !$seq;    # the first of a part of a trail
        bad("is record $number where " . ($seq + 1) . ' is expected') if $number != $seq + 1;
        bad("record $number does not carry the hash of the one before") if $before ne $prev;
        bad("record $number was changed: its hash is of something else") if sha256_hex($body) ne $hash;
        seal($number, $1, $before) if $line =~ /\A\{"seq":\d+,"time":"[^"]*","type":"audit\.seal",.*?"data":(\{.*)/;
        ($seq, $prev) = ($number, $hash);
    }
}
print "fits: $seq is the last record, $seals seals, ", $seq - $sealed, " records after the newest; $seq:$prev\n";

sub seal {
    my ($number, $data, $before) = @_;
    my ($from, $to) = map { $data =~ /"$_":(\d+)/ ? $1 : bad('seal without its range') } 'from', 'to';
    my ($hash, $name, $signature) = map { $data =~ /"$_":"([0-9a-f]+)"/ ? $1 : bad("seal without $_") }
        'hash', 'key', 'signature';
    bad("seal $number is not for the records before it")
        if $to != $number - 1 || $hash ne $before || ($seals && $from != $sealed);
    bad("seal $number is signed by $name, which is not in $pem") unless $key{$name};
    spill("$dir/message", "isolator audit seal\n$from $to $hash\n");
    spill("$dir/signature", pack 'H*', $signature);
    my $said = qx(openssl pkeyutl -verify -pubin -inkey $key{$name} -rawin -in $dir/message -sigfile $dir/signature 2>&1);
    bad("the signature of seal $number does not fit: records $from to $to were replaced") if $? != 0;
    ($sealed, $seals) = ($number, $seals + 1);
}

sub bad { print "does not fit: $place: $_[0]\n"; exit 1 }
sub spill { open my $out, '>:raw', $_[0] or die "$_[0]: $!\n"; print $out $_[1]; close $out or die "$_[0]: $!\n" }
